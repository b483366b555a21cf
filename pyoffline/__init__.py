"""pyoffline: kernel-accelerated losses for post-training language models from offline samples.

    import pyoffline as po

    tokens = po.TokenBatch(labels, advantages=advantages, old_logps=old_logps)
    out = po.linear_policy_loss(hidden, po.Head.of(model), tokens, po.PPOClip())
    out.loss.backward()

Importing needs torch and numpy only; it starts no threads and touches no GPU.
"""

from pyoffline import advantages as advantages
from pyoffline import corrections as corrections
from pyoffline import diagnostics as diagnostics
from pyoffline import imitation as imitation
from pyoffline import reward_models as reward_models
from pyoffline.aggregate import GlobalCounts as GlobalCounts
from pyoffline.aggregate import shift_labels as shift_labels
from pyoffline.aggregate import token_weights as token_weights
from pyoffline.backends import backends as backends
from pyoffline.backends import use_backend as use_backend
from pyoffline.compose import Objective as Objective
from pyoffline.cross_entropy import cross_entropy as cross_entropy
from pyoffline.cross_entropy import linear_cross_entropy as linear_cross_entropy
from pyoffline.custom import ShapedIS as ShapedIS
from pyoffline.custom import custom as custom
from pyoffline.custom import register_objective as register_objective
from pyoffline.device_flags import check as check
from pyoffline.distill import cosine_distill_loss as cosine_distill_loss
from pyoffline.distill import linear_distill_loss as linear_distill_loss
from pyoffline.divergences import JSD as JSD
from pyoffline.divergences import TVD as TVD
from pyoffline.divergences import AlphaDivergence as AlphaDivergence
from pyoffline.divergences import Divergence as Divergence
from pyoffline.divergences import ForwardKL as ForwardKL
from pyoffline.divergences import RenyiDivergence as RenyiDivergence
from pyoffline.divergences import ReverseKL as ReverseKL
from pyoffline.explain import explain as explain
from pyoffline.head import Head as Head
from pyoffline.logps import linear_token_logps as linear_token_logps
from pyoffline.logps import token_logps as token_logps
from pyoffline.plan import chunk_rows as chunk_rows
from pyoffline.plan import deterministic as deterministic
from pyoffline.plan import memory_budget as memory_budget
from pyoffline.policy_loss import linear_policy_loss as linear_policy_loss
from pyoffline.policy_loss import policy_loss as policy_loss
from pyoffline.preference import CPO as CPO
from pyoffline.preference import DPO as DPO
from pyoffline.preference import KTO as KTO
from pyoffline.preference import ORPO as ORPO
from pyoffline.preference import RRHF as RRHF
from pyoffline.preference import TPO as TPO
from pyoffline.preference import WPO as WPO
from pyoffline.preference import AlphaPO as AlphaPO
from pyoffline.preference import ListDPO as ListDPO
from pyoffline.preference import SimPO as SimPO
from pyoffline.records import LossOutput as LossOutput
from pyoffline.records import SequenceBatch as SequenceBatch
from pyoffline.records import TokenBatch as TokenBatch
from pyoffline.records import TokenStats as TokenStats
from pyoffline.scratch import release_scratch as release_scratch
from pyoffline.sequence_objectives import GMPO as GMPO
from pyoffline.sequence_objectives import GSPO as GSPO
from pyoffline.sequence_objectives import LUSPO as LUSPO
from pyoffline.sequence_objectives import OPSM as OPSM
from pyoffline.sequence_objectives import TOPR as TOPR
from pyoffline.sequence_objectives import VESPO as VESPO
from pyoffline.sequence_objectives import AlphaELBO as AlphaELBO
from pyoffline.sequence_objectives import AStarPO as AStarPO
from pyoffline.sequence_objectives import (
    ImportanceWeightedSFTSequence as ImportanceWeightedSFTSequence,
)
from pyoffline.sequence_objectives import KLRegularizedPG as KLRegularizedPG
from pyoffline.sequence_objectives import RenyiRWR as RenyiRWR
from pyoffline.sequence_objectives import SequencePowerIS as SequencePowerIS
from pyoffline.teachers import TeacherHead as TeacherHead
from pyoffline.teachers import TeacherLogits as TeacherLogits
from pyoffline.teachers import TeacherTopK as TeacherTopK
from pyoffline.token_objectives import CISPO as CISPO
from pyoffline.token_objectives import DFT as DFT
from pyoffline.token_objectives import DPPO as DPPO
from pyoffline.token_objectives import DRO as DRO
from pyoffline.token_objectives import KL as KL
from pyoffline.token_objectives import NLL as NLL
from pyoffline.token_objectives import SAPO as SAPO
from pyoffline.token_objectives import AsymRE as AsymRE
from pyoffline.token_objectives import DecoupledPPO as DecoupledPPO
from pyoffline.token_objectives import DistillToken as DistillToken
from pyoffline.token_objectives import Entropy as Entropy
from pyoffline.token_objectives import ImportanceSampling as ImportanceSampling
from pyoffline.token_objectives import ImportanceWeightedSFT as ImportanceWeightedSFT
from pyoffline.token_objectives import Luffy as Luffy
from pyoffline.token_objectives import PowerIS as PowerIS
from pyoffline.token_objectives import PPOClip as PPOClip
from pyoffline.token_objectives import ProbPower as ProbPower
from pyoffline.token_objectives import ProximalSFT as ProximalSFT
from pyoffline.token_objectives import TOPRToken as TOPRToken
from pyoffline.token_objectives import TruncatedIS as TruncatedIS
from pyoffline.token_objectives import WeightedNLL as WeightedNLL
from pyoffline.token_objectives import ZLoss as ZLoss
from pyoffline.value_loss import ValueLoss as ValueLoss

__version__ = "0.1.0"

_TRAINING = ("OfflineTrainer", "OfflineConfig")


def __getattr__(name: str):
    """The trainer is imported when asked for: it needs transformers, the library does not."""
    if name in _TRAINING:
        from pyoffline import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'pyoffline' has no attribute {name!r}")
