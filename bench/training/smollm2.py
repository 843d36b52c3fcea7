"""SmolLM2-135M on tweets by MeZO, LOZO and AdamW: ``python -m bench.training.smollm2 DIR``.

Written down before the runs. A method succeeds if, within 1,000 forward passes over batches of 16
(a backward pass counts as two), its mean accuracy over three seeds on 500 tweets that it has not
seen is at least 15 points above that of the model before, with the weights of the last step: none
are picked by their accuracy. The learning rate of each method is the best of three, a factor of 3
apart, by the dev loss after 300 passes with a seed of its own (100).
"""
