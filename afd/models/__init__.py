"""Networks and codecs: the causal student, the discriminators, text and video encoders, weight formats."""
