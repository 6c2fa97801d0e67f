"""Trainers: each a configuration and a few hooks. `METHODS` names them all."""

from .base import EfficientReasoningTrainer
from .base_config import EfficientReasoningConfig
from .critique_grpo import CritiqueGRPOTrainer
from .critique_grpo_config import CritiqueGRPOConfig
from .dler import DLERTrainer
from .dler_config import DLERConfig
from .gvm import GVMTrainer
from .gvm_config import GVMConfig
from .lapo import LAPOTrainer
from .lapo_config import LAPOConfig
from .lead import LEADTrainer
from .lead_config import LEADConfig
from .nft import NFTTrainer
from .nft_config import NFTConfig
from .s_grpo import SGRPOTrainer
from .s_grpo_config import SGRPOConfig
from .sas import SASTrainer
from .sas_config import SASConfig, StepSelection
from .seed_grpo import SEEDGRPOTrainer
from .seed_grpo_config import SEEDGRPOConfig
from .spae import SPAETrainer
from .spae_config import SPAEConfig
from .spo import SPOTrainer
from .spo_config import SPOConfig
from .step_grpo import StepGRPOTrainer
from .step_grpo_config import StepGRPOConfig


# Name in recipes to trainer and configuration. A new method needs no more than its line here.
METHODS: dict[str, tuple[type[EfficientReasoningTrainer], type[EfficientReasoningConfig]]] = {
    "grpo": (EfficientReasoningTrainer, EfficientReasoningConfig),
    "step_grpo": (StepGRPOTrainer, StepGRPOConfig),
    "sas": (SASTrainer, SASConfig),
    "s_grpo": (SGRPOTrainer, SGRPOConfig),
    "lapo": (LAPOTrainer, LAPOConfig),
    "seed_grpo": (SEEDGRPOTrainer, SEEDGRPOConfig),
    "nft": (NFTTrainer, NFTConfig),
    "spo": (SPOTrainer, SPOConfig),
    "critique_grpo": (CritiqueGRPOTrainer, CritiqueGRPOConfig),
    "gvm": (GVMTrainer, GVMConfig),
    "lead": (LEADTrainer, LEADConfig),
    "dler": (DLERTrainer, DLERConfig),
    "spae": (SPAETrainer, SPAEConfig),
}

__all__ = [
    "METHODS",
    "CritiqueGRPOConfig",
    "CritiqueGRPOTrainer",
    "DLERConfig",
    "DLERTrainer",
    "EfficientReasoningConfig",
    "EfficientReasoningTrainer",
    "GVMConfig",
    "GVMTrainer",
    "LAPOConfig",
    "LAPOTrainer",
    "LEADConfig",
    "LEADTrainer",
    "NFTConfig",
    "NFTTrainer",
    "SASConfig",
    "SASTrainer",
    "SEEDGRPOConfig",
    "SEEDGRPOTrainer",
    "SGRPOConfig",
    "SGRPOTrainer",
    "SPAEConfig",
    "SPAETrainer",
    "SPOConfig",
    "SPOTrainer",
    "StepGRPOConfig",
    "StepGRPOTrainer",
    "StepSelection",
]
