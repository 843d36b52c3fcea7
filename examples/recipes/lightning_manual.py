"""Lightning, with manual optimization: its automatic kind would call backward."""

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

import zo_fused

name = "facebook/opt-125m"
tokenizer = AutoTokenizer.from_pretrained(name)
texts = ["a gripping film. It was great", "two dull hours. It was terrible"] * 8  # your data here
collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
data = DataLoader([tokenizer(text) for text in texts], batch_size=4, collate_fn=collate)


class Tuning(lightning.LightningModule):
    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)

    def training_step(self, batch, _):
        loss = self.optimizers().step(closure=lambda: self.model(**batch).loss)
        self.log("loss", loss, prog_bar=True)

    def configure_optimizers(self):
        return zo_fused.LOZO(self.model, lr=1e-6, deferred=True)


tuning = Tuning()
lightning.Trainer(max_epochs=5, devices=1, logger=False).fit(tuning.train(), data)
tuning.model.save_pretrained("tuned")
