"""What a run leaves when it is over: the adapter, the tokenizer, what its routers did."""

from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from qd2mora.adapter_folder import save_adapter
from qd2mora.base.tokenizer import save_tokenizer
from qd2mora.inspection import write_routing
from qd2mora.objectives.head import head_tensors
from qd2mora.run_folder import RunFolder
from qd2mora.training.disk_space import as_trouble
from qd2mora.training.held_out import LiveRouting
from qd2mora.training.loop import Training


def save_result(
    folder: RunFolder, training: Training, tokenizer: PreTrainedTokenizerBase, mark: dict[str, str]
) -> None:
    """Write what is left of a run; `mark` is what the adapter remembers of its base. Raises DiskTrouble."""
    with as_trouble("the adapter", folder.path):
        save_whole(training.batches.model, folder.adapter, mark)
        save_tokenizer(tokenizer, folder.path)
    if training.train.final == "best":
        _take_best(folder, training)
    else:
        _save_routing(folder, training.held_out.live)


def save_whole(model: PeftModel, folder: Path, mark: dict[str, str]) -> None:
    """Write all that was trained: the adapter, and the head where there is one. Raises OSError."""
    save_adapter(model, folder, mark, head_tensors(model))


def _take_best(folder: RunFolder, training: Training) -> None:
    """Let the adapter of the best evaluation be the run's result."""
    with as_trouble("the adapter", folder.path):
        step = training.best.copy_to(folder.adapter, training.progress)
        folder.routing.unlink(missing_ok=True)  # what was measured may be another step's
    training.journal.say(f"adapter/ holds step {step}, the best overall")


def _save_routing(folder: RunFolder, live: LiveRouting) -> None:
    """Write what routers did in the last evaluation; a run that was over before has its report, or gets it when asked.

    A method without routers is told as such.
    """
    if live.step is not None or not live.watch.routers:
        with as_trouble("the routing report", folder.path):
            write_routing(folder, live.report())


__all__ = ["save_result", "save_whole"]
