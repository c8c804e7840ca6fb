"""`task=evaluate`: how good are a run's features, level by level, beside the untrained network's and the pixels themselves?"""
