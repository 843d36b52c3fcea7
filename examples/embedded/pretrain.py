"""Makes the embedded model: a byte-level BPE tokenizer and a small OPT, from the grammar's corpus.

Run `make_data.py` first: the labelled texts are kept out of the pre-training corpus.
"""

import argparse
import json
import math
import time
from itertools import islice
from pathlib import Path
from random import Random

import torch
from make_data import EMBEDDED, pretraining_corpus, read_texts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

BOS, PAD, UNK = "</s>", "<pad>", "<unk>"  # OPT starts and ends a text with </s>
SPECIAL_TOKENS = ["<s>", PAD, BOS, UNK]  # ids 0, 1, 2, 3 as in OPT

MODEL_CARD = """\
---
license: apache-2.0
language: en
---

# Embedded model

A causal language model of the OPT architecture with {parameters:,} parameters ({hidden} hidden
units, {layers} layers, {heads} heads, {vocabulary} byte-level BPE tokens), small enough to be
fine-tuned on a CPU within a minute or two.  It knows made-up English reviews and everyday
sentences from the grammar in `examples/embedded/grammar.py`, and nothing else: it is meant for
demonstrations and tests, not for real text.

`examples/embedded/pretrain.py` trained it from scratch with AdamW in {steps} + {untie_steps}
steps of {batch} documents (final loss {loss:.3f}) on two CPU cores.
The texts of the labelled task in `../data` were kept out of its corpus.

Licence: Apache-2.0, like the rest of the project.
"""


def train_tokenizer(documents: list[str], vocabulary: int, length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that, like OPT's, puts </s> before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=BOS,
        pad_token=PAD,
        unk_token=UNK,
        model_max_length=length,
        clean_up_tokenization_spaces=False,
    )


def tokenize(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """The token ids of the documents, each between </s> and </s>."""
    tokens = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(documents)["input_ids"]]
    print(f"{len(documents)} documents, {sum(map(len, tokens))} tokens")
    return tokens


def make_batches(
    tokens: list[list[int]], batch_size: int, steps: int, rng: Random
) -> list[list[int]]:
    """Indices of `steps` batches of documents of similar lengths, in random order."""
    batches: list[list[int]] = []
    while len(batches) < steps:
        order = sorted(range(len(tokens)), key=lambda i: (len(tokens[i]), rng.random()))
        epoch = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        rng.shuffle(epoch)
        batches += epoch
    return batches[:steps]


def pad(rows: list[list[int]], value: int) -> torch.Tensor:
    """The rows as one tensor, padded on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def pretrain(
    model: OPTForCausalLM,
    tokens: list[list[int]],
    steps: int,
    lr: float,
    args: argparse.Namespace,
) -> float:
    """Trains the model on next-token prediction; the mean loss of the last 100 steps."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))

    def schedule(step: int) -> float:
        warm_up = max(1, steps // 20)
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        return min((step + 1) / warm_up, 0.02 + 0.98 * cosine)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    losses = []
    model.train()
    batches = make_batches(tokens, args.batch_size, steps, Random(args.seed))
    bar = tqdm(batches, unit="step")
    for step, batch in enumerate(bar):
        rows = [tokens[i] for i in batch]
        mask = pad([[1] * len(row) for row in rows], 0)
        labels = pad(rows, -100)
        inputs = pad(rows, model.config.pad_token_id)
        loss = model(input_ids=inputs, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        recent = losses[-100:]
        if step % 10 == 0:
            bar.set_postfix(loss=f"{sum(recent) / len(recent):.3f}")
        if (step + 1) % 500 == 0:
            tqdm.write(f"step {step + 1}: loss {sum(recent) / len(recent):.4f}")
    return sum(recent) / len(recent)


def save(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes the model and the tokenizer, loadable by transformers 4 and 5."""
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.pop("backend", None)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for path in out.iterdir():
        path.chmod(0o644)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=EMBEDDED / "data", help="labelled texts")
    parser.add_argument("--out", type=Path, default=EMBEDDED / "model")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--documents", type=int, default=120000)
    parser.add_argument("--prompt-share", type=float, default=0.08, help="see make_data.py")
    parser.add_argument("--agreement", type=float, default=0.55, help="see make_data.py")
    parser.add_argument("--vocabulary", type=int, default=2000)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--ffn", type=int, default=512)
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--untie-steps", type=int, default=80, help="steps of the second phase")
    parser.add_argument("--untie-share", type=float, default=0.3, help="its --prompt-share")
    parser.add_argument("--untie-lr", type=float, default=5e-4)
    parser.add_argument("--start", type=Path, help="skip the first phase, load its model from here")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    start = time.perf_counter()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    excluded = read_texts(args.data)
    corpus = pretraining_corpus(excluded, args.seed + 1, args.prompt_share, args.agreement)
    documents = list(tqdm(islice(corpus, args.documents), total=args.documents, unit="doc"))
    tokenizer = train_tokenizer(documents, args.vocabulary, args.positions)

    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        word_embed_proj_dim=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        ffn_dim=args.ffn,
        max_position_embeddings=args.positions,
        dropout=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = OPTForCausalLM(config)
    print(f"{model.num_parameters():,} parameters")
    if args.start:
        model = OPTForCausalLM.from_pretrained(args.start)
    else:
        pretrain(model, tokenize(documents, tokenizer), args.steps, args.lr, args)
    # The second phase makes "great" and "terrible" after a review a matter of chance.
    corpus = pretraining_corpus(excluded, args.seed + 2, args.untie_share, 0.5)
    documents = list(islice(corpus, args.untie_steps * args.batch_size))
    loss = pretrain(model, tokenize(documents, tokenizer), args.untie_steps, args.untie_lr, args)

    save(model, tokenizer, args.out)
    minutes = math.ceil((time.perf_counter() - start) / 60)
    card = MODEL_CARD.format(
        parameters=model.num_parameters(),
        hidden=args.hidden,
        layers=args.layers,
        heads=args.heads,
        vocabulary=len(tokenizer),
        steps=args.steps,
        untie_steps=args.untie_steps,
        batch=args.batch_size,
        loss=loss,
    )
    (args.out / "README.md").write_text(card, encoding="utf-8")
    print(f"final loss {loss:.4f}, {minutes} minutes; saved to {args.out.name}")


if __name__ == "__main__":
    main()
