"""What stands behind each "?": what a symbol or a setting is, what happens when it grows, and where the paper has it.

Sections are those of the LoRA paper, arXiv 2106.09685v2; what came later is named by its own number.
"""

from __future__ import annotations

from app.pages.help_compare import COMPARE
from lora_core.audit import RULES

SYMBOLS = ("h", "W0", "x", "alpha", "r", "B", "A", "dW", "nW")  # of the formula strip, in its order
ADAPT = ("model", "task", "targets", "layers", "rank", "alpha", "scaling")
LATER = "Not in the paper; "


def entry(name: str, what: str, grows: str, paper: str) -> dict[str, str]:
    return {"name": name, "what": what, "grows": grows, "paper": paper}


HELP: dict[str, dict[str, str]] = {
    # ---- symbols
    "h": entry("h, the output", "What the matrix hands on: that of the frozen matrix plus that of the update.",
               "With ΔW = 0 it is the base model's to the bit; the larger ΔW is, the further it moves away.",
               "Section 4.1, equation 3."),
    "W0": entry("W0, the frozen matrix", "A matrix of the model as it was. Training never changes it, so it is stored "
                "once for all tasks.", "A larger matrix makes LoRA cheaper beside full fine-tuning: r·(out + in) "
                "numbers are trained in place of out·in.", "Section 4.1; what is saved: section 4.2."),
    "x": entry("x, the input", "What comes into the matrix: one vector of `in` numbers for each token. W0 and A both "
               "read it.", "A larger x makes W0·x and B·A·x larger alike.", "Section 4.1, equation 3."),
    "alpha": entry("α, alpha", "ΔW is multiplied by s = α/r. It is set once and mostly left alone.",
                   "The same A and B act more strongly; with Adam that is much like a larger learning rate.",
                   "Section 4.1."),
    "r": entry("r, the rank", "How many directions ΔW may have: B has r columns, and A has r rows.",
               "More can be learnt, file and memory grow with it; from a small r on, the loss hardly changes.",
               "Sections 4.1 and 7.2; Tables 6 and 18."),
    "B": entry("B, out × r", "The thin matrix that writes: its columns are the directions in which ΔW can move the "
               "output. It starts at zero, so ΔW does too.",
               "From zero on it grows as it is trained, and ΔW = s·B·A with it.", "Section 4.1."),
    "A": entry("A, r × in", "The thin matrix that reads: each row takes one number out of the input. It starts random: "
               "were both zero, no gradient would reach either.",
               "A larger start makes the first steps of B larger; ΔW is zero all the same.", "Section 4.1."),
    "dW": entry("‖ΔW‖, size of the update", "The root of the sum of all squared entries of ΔW = s·B·A (Frobenius norm) "
                "in the chosen matrix, of the run that is open.",
                "It grows with steps, rate and α. The model moves further away from what it was, for better or worse.",
                "Section 7.3, Table 7."),
    "nW": entry("‖W0‖, size of the matrix", "The same norm of the frozen matrix, to see ΔW against: a ΔW of a few per "
                "cent can change every answer.", "The same ΔW is a smaller change, as far as sizes tell: what counts "
                "is the direction in which it acts.", "Section 7.3, Table 7."),
    # ---- Adapt
    "model": entry("the model", "The language model whose matrices are frozen and adapted.",
                   "Steps take longer and need more memory; a larger model often needs a smaller rank and rate.",
                   "Section 5; Table 4 has 175 billion numbers."),
    "task": entry("the task", "The rows that are trained on and those that are held out: one of those here, or your "
                  "own file.", "More rows mean that a run of the same steps sees each of them less often.",
                  "Section 5; Table 16 compares 100 rows with all."),
    "targets": entry("the matrices", "Which matrices of a layer get a ΔW. The paper takes q and v and freezes the MLP.",
                     "More matrices train more numbers. For the same number, more kinds at a lower rank do better "
                     "than one at a high rank.", "Section 7.1, Table 5."),
    "layers": entry("the layers", "In which layers the chosen matrices are adapted. The paper takes all of them.",
                    "More numbers are trained. Below the lowest adapted layer no gradient is needed, which saves time.",
                    "Section 4.2; the choice of layers is left open there."),
    "rank": entry("rank r", "How many directions each ΔW may have, here the same for every matrix.",
                  "File, memory and what can be learnt grow; the loss soon stops to. Under α/r the scaling falls.",
                  "Section 7.2; Tables 6 and 18."),
    "scaling": entry("the scaling of B·A", "s = α/r is the paper's. α/√r (rsLoRA) falls more slowly with r.",
                     "At the same r and α, a larger s makes every step of ΔW larger.",
                     "Section 4.1; α/√r is arXiv 2312.03732."),
    # ---- Train
    "steps": entry("steps", "How often A and B are changed: one change for each batch.",
                   "Training takes longer, the loss falls further; after too many the held-out loss rises again.",
                   "Appendix D, Tables 9 to 12 (as epochs)."),
    "lr": entry("the learning rate", "How far one step of AdamW moves A and B, at its peak.",
                "Faster learning, then a loss that jumps, then none: LoRA takes about ten times the rate of full "
                "fine-tuning.", "Appendix D, Tables 9 to 12: 2e-4 for GPT-2."),
    "batch_size": entry("the batch", "How many rows are read for one step; the gradient is their mean.",
                        "Steadier gradients, fewer steps needed, more time and memory for each.",
                        "Appendix D, Tables 9 to 12: 8 for GPT-2 on E2E."),
    "seed": entry("the seed", "Draws A, the order of the rows, and which rows are held out.",
                  "Nothing in particular: another seed is another run of the same settings. Compare a few before "
                  "believing a small difference.", "Section 5: means over seeds; Figure 4 compares two."),
    "schedule": entry("the schedule", "How the rate falls from its peak: linear or cosine to zero, or not at all.",
                      "The longer the rate stays high, the further the weights move, and the noisier is the end.",
                      "Appendix D: linear."),
    "warmup": entry("the warm-up", "The share of the steps in which the rate rises from 0 to its peak.",
                    "A calmer beginning, and fewer steps at the full rate.", "Appendix D, Table 11: 500 steps."),
    "accumulate": entry("accumulation", "Batches whose gradients are added up before one step is made.",
                        "As a larger batch, at the memory of a small one: each step takes that many times longer.",
                        LATER + "a common way to reach its batch sizes on less memory."),
    "max_tokens": entry("the longest row", "Tokens of a row that are kept; what is behind them is cut off.",
                        "More of long rows is learnt from; time and memory grow with the longest row of a batch.",
                        "Appendix D, Tables 9 to 12 (sequence length)."),
    "eval_rows": entry("held-out rows", "How many rows that are never trained on the loss is measured on.",
                       "A steadier measurement, and more time for each of them.",
                       "Section 5: all results are on held-out rows."),
    "eval_every": entry("measure every", "Steps between two measurements of the held-out loss; 0 takes three in a run.",
                        "Fewer large points in the curve, and less time for them.",
                        LATER + "it changes nothing that is learnt."),
    "weight_decay": entry("weight decay", "Pulls A and B a little towards 0 at each step.",
                          "A smaller ΔW: the pull is towards the base model, since ΔW = 0 is W0.",
                          "Appendix D, Table 11: 0.01 for GPT-2."),
    "clip": entry("clipping", "A gradient that is longer than this is shortened to it; 0 for no limit.",
                  "Fewer gradients are shortened, so a bad batch may throw the weights further.",
                  LATER + "it is usual with transformers."),
    "dtype": entry("the numbers", "The format of the frozen model; A and B are float32 in any case.",
                   "float32 is twice as large as bfloat16 and more exact; auto takes the faster one here.",
                   "Section 4.2: 350 GB for 175 billion numbers, two bytes each."),
    "dropout": entry("dropout", "The share of the inputs of A that are left out at random while training.",
                     "Less is learnt by heart, and more slowly; 0.1 is much for few steps.",
                     "Appendix D, Table 11: 0.1 for GPT-2."),
    "init": entry("the start", "How A and B begin. gaussian: A random, B zero. pissa and gradient begin at directions "
                  "of W0 or of the first gradient.", "It is a choice, not a size: a larger random A makes B's first "
                  "steps larger.", "Section 4.1; pissa is arXiv 2404.02948, gradient arXiv 2407.05000."),
    "train_A": entry("A is trained", "No: A stays as it was drawn, and B alone learns (LoRA-FA).",
                     "With A trained there are more numbers to train, and ΔW may turn its input directions.",
                     "Section 4.1 trains both; LoRA-FA is arXiv 2308.03303."),
    "lr_ratio": entry("B's rate over A's", "B learns at this many times the rate of A.",
                      "B, which starts at zero, comes up faster; too large a ratio makes the loss jump.",
                      "1 is the paper's; LoRA+ (arXiv 2402.12354) takes about 16."),
}  # fmt: skip
HELP["verdict"] = entry(
    "the word for a matrix",
    "Good where its rank is used: full or partly used. Weak where it is dead, that is hardly changed. Collapsed where "
    "one direction does nearly all. " + " ".join(f"{w[0].upper()}{w[1:]}: {rule}." for w, rule in RULES.items()),
    "A larger rank leaves more of itself unused: full becomes partly used, and in the end collapsed.",
    "Section 7.2 asks how much of a rank is used; the words and their bounds are ours.",
)
HELP |= COMPARE
