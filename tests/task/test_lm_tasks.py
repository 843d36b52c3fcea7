"""The papers' tasks, letter for letter, and tasks of lm_eval and of users, offline."""

import importlib.util
from pathlib import Path

import pytest

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("needs lm_eval: `make test-tasks` installs it", allow_module_level=True)
pytest.importorskip("transformers")

from zo_fused.task.lm_tasks import PAPERS, LmTask
from zo_fused.task.splits import Draw

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

DATA = Path(__file__).parents[1] / "data" / "tasks"
YES = ("No", "Yes")
ONE, TWO = (0,), (1,)
ANA = "Ana Reis won the race in Lund. Per Holm came second.\n"
ANA += "- Reis led from the start\n- Holm was hurt\n-"
RECORD = [f" After the race {who} thanked her trainer" for who in ("Ana Reis", "Lund", "Per Holm")]
RECORD = (*RECORD, " After the race Reis thanked her trainer")
SKAGEN = "Title: Lighthouse\nContext: The lighthouse of Skagen was lit in 1858. It stands 46 "
SKAGEN += "metres tall.\nQuestion: When was the lighthouse of Skagen lit?\nAnswer:"
GRADES = tuple(f" {word}" for word in ("terrible", "bad", "okay", "good", "great"))
KINDS = ("Expression", "Entity", "Description", "Human", "Location", "Number")
NLI = (" Yes", " Maybe", " No")

# Task -> its file of records, and of some records (by number) the prompt, the candidates and the
# numbers of the right ones. Written from the templates of MeZO's code (large_models/templates.py,
# medium_models/run_fewshot.sh) and of the ZO benchmark's, not with ours. Where those split a text
# after a space, the space is the answer's here.
GOLDEN = {
    "mezo_sst2": ("glue_sst2", {
        0: ("a bright , patient film about bees It was", (" terrible", " great"), TWO),
        1: ("the second hour never ends It was", (" terrible", " great"), ONE),
    }),
    "mezo_rte": ("super_glue_rte", {
        0: ("The bridge at Ostra was closed on Monday after a crack was found.\nDoes this mean "
            'that "The bridge at Ostra has a crack." is true? Yes or No?\n', ("Yes", "No"), ONE),
        1: ('Lena paints boats.\nDoes this mean that "Lena sells boats." is true? Yes or No?\n',
            ("Yes", "No"), TWO),
    }),
    "mezo_cb": ("super_glue_cb", {
        0: ("Suppose A: Is it far? B: I don't think it is far. Can we infer that \"it is far\"? "
            "Yes, No, or Maybe?\n", ("Yes", "No", "Maybe"), TWO),
        2: ('Suppose Perhaps he left early. Can we infer that "he left early"? Yes, No, or '
            "Maybe?\n", ("Yes", "No", "Maybe"), (2,)),
    }),
    "mezo_boolq": ("super_glue_boolq", {
        0: ("Kestrel -- The kestrel is a small falcon that hovers. Is the kestrel a falcon?\n",
            YES, TWO),
        1: ("Owl -- Owls swallow small prey whole. Do owls have teeth?\n", YES, ONE),
    }),
    "mezo_wsc": ("super_glue_wsc.fixed", {
        0: ("Ida thanked Maud because She had found the key.\nIn the previous sentence, does the "
            'pronoun "she" refer to Ida? Yes or No?\n', YES, ONE),
    }),
    "mezo_wic": ("super_glue_wic", {
        1: ('Does the word "light" have the same meaning in these two sentences? Yes, No?\n'
            "Light fell on the page.\nThere was little light.\n", YES, TWO),
    }),
    "mezo_multirc": ("super_glue_multirc", {
        1: ("Nils took the ferry at nine. His dog stayed at home.\nQuestion: Who stayed at home?\n"
            'I found this answer "Nils". Is that correct? Yes or No?\n', YES, ONE),
    }),
    "mezo_copa": ("super_glue_copa", {
        0: ("The jar slipped from my hands so",
            (" it broke on the floor.", " I filled it with honey."), ONE),
        1: ("The bees left the hive because",
            (" the hive was empty.", " the queen had died."), TWO),
    }),
    "mezo_record": ("super_glue_record", {0: (ANA, RECORD, (3, 0))}),
    "mezo_squad": ("squad", {0: (SKAGEN, (" 1858\n",), ONE)}),
    "mezo_drop": ("drop", {
        0: ("Passage: The home side scored 3 goals before the break and 1 after it.\nQuestion: "
            "How many goals did the home side score?\nAnswer:", (" 4\n",), ONE),
        1: ("Passage: Moss and Dahl both scored.\nQuestion: Which players scored?\nAnswer:",
            (" Moss\n",), ONE),
    }),
    "mezo_winogrande": ("winogrande", {
        0: ("Mia lent Eva her coat because", (" Mia was cold.", " Eva was cold."), TWO),
        1: ("The nail bent before the board did, so",
            (" the nail was soft.", " the board was soft."), ONE),
    }),
    "mezo_roberta_sst2": ("glue_sst2", {
        # two spaces: the sentences of GLUE end in one, and LM-BFF's template starts with one
        3: ("nobody needed this  It was<mask>.", (" terrible", " great"), ONE),
    }),
    "mezo_roberta_sst5": ("sst5", {
        0: ("a bright , patient film about bees It was<mask>.", GRADES, (4,)),
    }),
    "mezo_roberta_snli": ("snli", {
        2: ("Two men carry a ladder?<mask>, nobody is there.", NLI, (2,)),
    }),
    "mezo_roberta_mnli": ("glue_mnli", {
        0: ("Two men carry a ladder?<mask>, some men carry a ladder.", NLI, ONE),
        1: ("Two men carry a ladder?<mask>, they paint a wall.", NLI, TWO),
    }),
    "mezo_roberta_rte": ("glue_rte", {
        1: ("Lena paints boats?<mask>, lena sells boats.", (" Yes", " No"), TWO),
    }),
    "mezo_roberta_trec": ("trec", {
        1: ("<mask>: Who built the lighthouse of Skagen ?", tuple(f" {k}" for k in KINDS), (3,)),
    }),
}  # fmt: skip


def local(name, source=None):
    source = str(DATA / f"{source or GOLDEN[name][0]}.jsonl")
    return LmTask(name, {"train": source, "test": source})


def in_order(task):
    """All of a task's records: its test set is drawn whole, then put in order."""
    examples = task.examples(Draw(dev=1))["test"]
    return sorted(examples, key=lambda example: int(example.source.rpartition(" ")[2]))


def test_every_task_has_golden_strings():
    assert {path.stem for path in PAPERS.glob("*.yaml")} == GOLDEN.keys()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_strings(name):
    task = local(name)
    examples = in_order(task)
    for number, (prompt, answers, right) in GOLDEN[name][1].items():
        question = task.question(examples[number], mask="<mask>")
        assert question.prompts == (prompt,)
        assert question.answers == answers
        assert question.right == right
        assert task.answers in ((), answers)
    assert task.masked == ("roberta" in name)
    assert task.generates == (name in ("mezo_squad", "mezo_drop"))
    of_one_answer = {"mezo_copa", "mezo_record", "mezo_squad", "mezo_drop", "mezo_winogrande"}
    assert task.loss == ("lm" if name in of_one_answer else "classification")
    assert (task.answers == ()) == (name in of_one_answer)
