"""Evolution strategies as es-at-scale's: engines of vLLM, a GPU each, as actors of Ray."""

import ray
from vllm import LLM, SamplingParams

ENGINES, POPULATION, GENERATIONS = 4, 30, 100
prompts = ["a gripping film. It was", "two dull hours. It was"] * 4  # your data here
answers = ["great", "terrible"] * 4
greedy = SamplingParams(temperature=0.0, max_tokens=8)


def reward(outputs):
    """Of a member: the share of right answers. Any number will do."""
    texts = [output.outputs[0].text for output in outputs]
    right = sum(answer in text for answer, text in zip(answers, texts, strict=True))
    return right / len(answers)


engines = [
    ray.remote(num_gpus=1)(LLM).remote(
        model="Qwen/Qwen2.5-1.5B-Instruct",
        dtype="bfloat16",
        worker_extension_cls="zo_fused.integrations.vllm.ZOWorker",
        enable_prefix_caching=False,  # its keys and values would be of other weights
    )
    for _ in range(ENGINES)
]


def everywhere(method, *args):
    return ray.get([engine.collective_rpc.remote(method, args=args) for engine in engines])


options = {"population": POPULATION, "eps": 1e-3, "lr": 5e-4, "seed": 0}
logs = ["es.jsonl"] + [None] * (ENGINES - 1)  # one of them writes it
starts = [
    engine.collective_rpc.remote("zo_start", kwargs={**options, "log": log})
    for engine, log in zip(engines, logs, strict=True)
]
ray.get(starts)
for step in range(GENERATIONS):
    moves, outputs = [], []
    for member in range(POPULATION):  # each engine does what it is told in order
        engine = engines[member % ENGINES]
        moves.append(engine.collective_rpc.remote("zo_perturb", args=(member,)))
        outputs.append(engine.generate.remote(prompts, greedy))
    ray.get(moves)  # an error of these must not be missed
    rewards = [reward(output) for output in ray.get(outputs)]
    everywhere("zo_update", rewards)
    print(f"{step} mean reward {sum(rewards) / POPULATION:.3f}, best {max(rewards):.3f}")
    prints = {tuple(found) for found in everywhere("zo_fingerprint")}
    assert len(prints) == 1, "engines differ"
