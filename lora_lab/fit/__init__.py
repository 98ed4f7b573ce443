"""How much memory a trial will take, from its settings and the model's shapes alone."""
