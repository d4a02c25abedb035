"""The mathematics of AFD: tensors in, tensors out; no models, no configuration, no communication."""
