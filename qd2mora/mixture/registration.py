"""The PEFT type QD2MORA: the one place that touches PEFT's enumeration and tables."""

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

NAME = "QD2MORA"
PREFIX = "mixture_"
MODEL_PREFIX = "base_model.model."
"""What PEFT puts before the base's own names, in modules and in files."""


def _extend_enum() -> PeftType:
    """Add the member as the enumeration itself would: a str whose value is its name, found by name and by value."""
    # PEFT has a door for methods from outside, `register_peft_method`, but it refuses a name that its own enumeration
    # lacks (peft 0.21.2; asked for in huggingface/peft#2273), and transformers 5.24 asks a type for its `value`, so
    # that a plain string does not do. Ends with the first release whose `register_peft_method` takes any name.
    if NAME in PeftType.__members__:
        return PeftType[NAME]
    member = str.__new__(PeftType, NAME)
    member._name_, member._value_ = NAME, NAME
    PeftType._member_map_[NAME] = member
    PeftType._member_names_.append(NAME)
    PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)
    return member


QD2MORA = _extend_enum()


def register(config_class: type[PeftConfig], model_class: type[BaseTuner]) -> None:
    """Tell PEFT about the method; once a process."""
    register_peft_method(name=NAME.lower(), config_cls=config_class, model_cls=model_class, prefix=PREFIX)


__all__ = ["MODEL_PREFIX", "PREFIX", "QD2MORA", "register"]
