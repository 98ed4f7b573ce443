"""A verdict on two settings from pairs of trials: the rule fixed beforehand, the judgement, the words."""
