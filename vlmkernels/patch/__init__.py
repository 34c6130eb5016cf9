"""transformers' models on the ops of this package, by one call: a file for each family of models.

from vlmkernels.patch import patch_model, unpatch_model

print(patch_model(model))
"""

from vlmkernels.patch._model import Report, patch_model, unpatch_model

__all__ = ["Report", "patch_model", "unpatch_model"]
