"""A loop of one's own."""

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

import zo_fused

name = "facebook/opt-125m"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
texts = ["a gripping film. It was great", "two dull hours. It was terrible"] * 8  # your data here
collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
data = DataLoader([tokenizer(text) for text in texts], batch_size=4, collate_fn=collate)

opt = zo_fused.LOZO(model, lr=1e-6, deferred=True)
schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, total_iters=20)
for epoch in range(5):
    for batch in data:
        loss = opt.step(lambda batch=batch: model(**batch).loss)
        schedule.step()
    print(f"epoch {epoch}: loss {loss.item():.4f}")
model.save_pretrained("tuned")
