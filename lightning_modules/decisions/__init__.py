"""From a score to a decision: good, defect or cannot tell, by what a run's record keeps of normal images.

    from lightning_modules.decisions import Decider, describe, with_features

    decider = Decider.of(record, rule=None, alpha=0.01)         # raises ValueError: the record's images cannot promise 0.01
    print("\n".join(decider.sentences()))                       # each category's threshold, and what it promises
    batch = with_features(module, batch)                        # the backbone's features, computed once
    scored = module.evaluate(batch)[""]                         # models.head.ScoredMaps
    seen = describe(module, batch)                              # float32 (B, D): what `choose` compares with categories
    choice = decider.choose(path, seen[0])                      # .category and .by: folder, nearest ...
    decision = decider.decide(score, choice, map_max)           # one `Decision`
    decision.verdict, decision.p_value, decision.threshold, decision.pixel_threshold, decision.reason
    decider.colour_scale(choice.category)                       # (low, high) of the category's heat maps

Everything is computed from the kept scores of normal images (`normal_scores.csv`, `normal_pixels.csv`), so another alpha or
rule needs no training. Records of earlier versions have no pixel threshold, and no category is chosen for their images.
"""

from lightning_modules.decisions.categories import Choice, describe, with_features
from lightning_modules.decisions.decider import CANNOT_TELL, DEFECT, GOOD, HELD_OUT, POOLED, Decider, Decision

__all__ = [
    "CANNOT_TELL",
    "DEFECT",
    "GOOD",
    "HELD_OUT",
    "POOLED",
    "Choice",
    "Decider",
    "Decision",
    "describe",
    "with_features",
]
