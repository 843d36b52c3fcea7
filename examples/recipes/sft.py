"""TRL's supervised fine-tuning."""

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from zo_fused.hf import ZOSFTTrainer

name = "facebook/opt-125m"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
reviews = {"a gripping film.": " great", "two dull hours.": " terrible"}  # your data here
examples = [{"prompt": f"{text} It was", "completion": word} for text, word in reviews.items()] * 8

on_gpu = torch.cuda.is_available()
args = SFTConfig("run", learning_rate=1e-6, num_train_epochs=5, logging_steps=4, bf16=on_gpu)
trainer = ZOSFTTrainer(
    model,
    args,
    train_dataset=Dataset.from_list(examples),
    processing_class=tokenizer,
    zo=("lozo", {"deferred": True}),
)
trainer.train()
trainer.save_model("tuned")
