#!/usr/bin/env bash
# The tests of the C++ backend with AddressSanitizer and UndefinedBehaviorSanitizer in the extension:
# in a copy of the sources, so that what is installed stays as it is.
#
#   tools/test_sanitized.sh PYTHON [TESTS...]
set -euo pipefail
python=$1
shift
copy=build/sanitized
mkdir -p "$copy"
git ls-files -z | tar -c --null --files-from=- | tar -x -C "$copy"
cd "$copy"
# The compiler is called with CFLAGS, also for C++.
CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer" \
  ZO_FUSED_NATIVE=cpu "$python" setup.py -q build_ext --inplace
# The interpreter itself is not built with them, so the libraries have to be loaded before all else.
# It never frees some of its memory, which leak detection would report.
preload=$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so):$(g++ -print-file-name=libstdc++.so)
LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
  "$python" -m pytest -q "${@:-tests/sweeps/test_native.py}"
