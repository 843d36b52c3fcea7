#!/usr/bin/env bash
# Environments for tests/integrations/test_plugins.py: tools/set_up_plugins.sh UV PYTHON [TOOL==VERSION..]
# With these pins the tools' own metadata resolves; torch is the one of constraints.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=$1 python=$2
shift 2
torch=$(grep '^torch==' constraints.txt)
for tool in "$@"; do
	place=build/plugins/${tool%%==*}
	[ -e "$place/.$tool" ] && continue
	rm -rf "$place"
	"$uv" venv -q --python "$python" "$place"
	"$uv" pip install -q --python "$place/bin/python" ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} "$torch" "$tool"
	touch "$place/.$tool"
done
