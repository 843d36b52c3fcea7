"""The Trainer of transformers."""

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    TrainingArguments,
)

from zo_fused.hf import ZOTrainer

name = "facebook/opt-125m"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
texts = ["a gripping film. It was great", "two dull hours. It was terrible"] * 8  # your data here

args = TrainingArguments(
    "run", learning_rate=1e-6, num_train_epochs=5, per_device_train_batch_size=4, logging_steps=4
)
trainer = ZOTrainer(
    model,
    args,
    train_dataset=[tokenizer(text) for text in texts],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    zo=("lozo", {"deferred": True}),
)
trainer.train()
trainer.save_model("tuned")
