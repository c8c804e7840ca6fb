"""How Hydra starts the jobs of a sweep. Hydra imports these modules at every start: they are light, the work is in hjepa."""
