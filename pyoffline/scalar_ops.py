"""The handful of elementwise operations that objective functions may use.

`objective_math` is written against the name `ops`. Here `ops` is torch; a kernel backend rebinds
the same name to its own namespace and compiles the same functions as device code. Not here:
anything that reduces over tokens.
"""

import torch

exp = torch.exp
expm1 = torch.expm1
log = torch.log
where = torch.where
