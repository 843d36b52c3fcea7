"""A loop with accelerate, also on several processes (`accelerate launch`): the loss of a step is
the mean over all of them.
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

import zo_fused

name = "facebook/opt-125m"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
texts = ["a gripping film. It was great", "two dull hours. It was terrible"] * 8  # your data here
collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
data = DataLoader([tokenizer(text) for text in texts], batch_size=4, collate_fn=collate)

accelerator = Accelerator()
model = accelerator.prepare_model(model, evaluation_mode=True)  # no wrapper that sums gradients
opt, data = accelerator.prepare(zo_fused.LOZO(model, lr=1e-6, deferred=True), data)
for epoch in range(5):
    for batch in data:
        loss = opt.optimizer.estimate(lambda batch=batch: model(**batch).loss)  # no backward
        opt.step()
    accelerator.print(f"epoch {epoch}: loss {loss.item():.4f}")
model.save_pretrained("tuned", is_main_process=accelerator.is_main_process)
