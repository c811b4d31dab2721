"""What stands behind each "?" of Compare; see help.py."""

from __future__ import annotations

COMPARE: dict[str, dict[str, str]] = {
    "cut_k": {
        "name": "k, the directions that are kept",
        "what": "Of every ΔW the k strongest directions act: its truncated singular value decomposition, the best "
        "matrix of that rank. k = 0 is the base model.",
        "grows": "More of what was learnt is there, and the file grows with it; often a few hold nearly all.",
        "paper": "Section 7.2: the first directions overlap between ranks; the cut itself is Eckart and Young's.",
    },
    "cut_energy": {
        "name": "kept energy",
        "what": "Every matrix keeps the fewest directions that hold this share of its own Σσ². So a matrix that acts "
        "along many directions keeps more of them.",
        "grows": "Each matrix comes nearer to what was learnt; at 100 % it is all of ΔW.",
        "paper": "Not in the paper; Σσ² is ‖ΔW‖ squared, which section 7.3 measures.",
    },
    "cut_mb": {
        "name": "megabytes of the file",
        "what": "All directions of all matrices compete for the room: those that hold most of Σσ² for their bytes are "
        "kept, so each matrix gets a rank of its own.",
        "grows": "More directions fit in; the last place is the whole file.",
        "paper": "Not in the paper; what a small file is worth: section 4.2.",
    },
    "strength": {
        "name": "the strength of ΔW",
        "what": "W0 + t·ΔW in place of W0 + ΔW. t = 1 is as it was learnt, 0 the base model, below 0 the opposite.",
        "grows": "From 0 to 1 what was learnt comes in; beyond, it is overdone, and the loss rises again.",
        "paper": "Section 4.1: α/r is the same factor, set before the training.",
    },
    "knock": {
        "name": "switching matrices off",
        "what": "ΔW of a matrix is left out, as if that matrix had not been adapted. The others stay as they were "
        "trained, so it is not what training without it would have given.",
        "grows": "The more are off, the nearer to the base model; some hardly matter, since others do the same work.",
        "paper": "Section 7.1 asks which matrices to adapt, by training each choice anew.",
    },
    "kl": {
        "name": "KL, over all tokens",
        "what": "Σ p'·log(p'/p) over the whole vocabulary: how far the adapted model's distribution p' of the next "
        "token is from the base's p, whichever token stands there, in nats.",
        "grows": "The adapter has more to say at this place; 0 means that it changes nothing there.",
        "paper": "Not in the paper.",
    },
    "merge": {
        "name": "whether two would merge",
        "what": "φ is the mean squared cosine of the angles between the inputs that both updates read, beside what "
        "random directions have; the cosine says whether they push the same way.",
        "grows": "With more overlap the sum disturbs both more. It is a hint: what the sum does has to be measured.",
        "paper": "φ: section 7.2, equation 4.",
    },
}
