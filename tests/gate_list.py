"""Every gate: its tests, what makes them long, and the guards whose loss must turn it red.

A gate on input is a function of `tests/safety/input_gates.py`; the others are tests that read their sizes from the
environment.
"""

# ruff: noqa: E501 - lines of the package are quoted whole

from dataclasses import dataclass, field

RELIABILITY = "tests/reliability"
Mutant = tuple[str, str, str]
"""A file of the package, what stands there once, and what is put in its place."""


@dataclass(frozen=True)
class Gate:
    """What is run: `tests`, files or parts of a file; `long`: sizes by environment variable; `quick`: for mutants."""

    claim: str
    tests: tuple[str, ...] = ()
    long: dict[str, float] = field(default_factory=dict)
    quick: dict[str, float] = field(default_factory=dict)
    mutants: tuple[Mutant, ...] = ()


def _in(file: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{RELIABILITY}/{file}::{name}" for name in names) or (f"{RELIABILITY}/{file}",)


BEFORE = "test_a_run_killed_before_its_first_checkpoint_ends_with_the_same_bytes"
KILLED = "test_runs_killed_at_any_moment_end_with_the_same_bytes"
UNDER_ZERO = "test_runs_under_zero_killed_at_any_moment_end_with_the_same_bytes"
SIGNALLED = (
    "test_a_signal_at_any_moment_stops_a_run_that_resumes_to_the_same_bytes",
    "test_a_signal_saves_where_no_save_is_due",
    "test_a_second_signal_ends_the_process_at_once",
    "test_a_run_stops_before_its_time_limit_and_resumes_to_the_same_bytes",
    "test_a_signal_that_a_library_takes_for_an_error_of_its_own_is_still_a_signal",
)
DAMAGED = (
    "test_any_changed_bit_is_found",
    "test_any_cut_or_grown_file_is_found",
    "test_a_changed_set_of_files_is_found_and_the_one_before_is_used",
    "test_deep_or_hostile_manifests_are_damage_and_nothing_else",
    "test_keeping_counts_whole_checkpoints_only",
)
DISK = (
    "test_a_disk_error_anywhere_in_a_save_leaves_the_old_checkpoints",
    "test_a_file_that_may_not_grow_beyond_any_size_leaves_the_old_checkpoints",
    "test_a_full_disk_ends_a_run_with_code_5_and_the_resume_gives_the_same_bytes",
    "test_a_result_that_does_not_fit_ends_with_code_5_and_leaves_the_old_one",
)
WATCHED = (
    "test_a_hung_step_ends_with_code_3_and_a_stack",
    "test_a_process_that_was_stopped_and_goes_on_is_not_taken_for_hung",
    "test_silence_beyond_the_limit_is_told_once",
    "test_nothing_is_saved_after_a_device_error",
)
NUMBERS = (
    "test_a_bad_step_costs_one_step_and_three_in_a_row_stop_the_run",
    "test_bad_steps_that_are_not_three_in_a_row_do_not_stop_the_run",
    "test_a_moment_that_is_not_finite_is_never_saved_and_the_resume_gives_the_same_bytes",
    "test_one_bad_step_in_a_hundred_is_too_many_once_there_are_ten",
    "test_an_overflow_of_float16_lowers_the_loss_scale_and_the_step_is_done_again",
)
INVENTORY = "test_every_tensor_that_is_not_the_one_of_the_run_is_refused_even_with_a_good_seal"

GATES: dict[str, Gate] = {
    "K1": Gate(
        "a run killed at any moment ends with the same bytes and loses no saved step",
        _in("test_kills.py", KILLED, UNDER_ZERO, BEFORE),
        {"GATE_KILLS": 2000, "GATE_WORKERS": 1, "GATE_ZERO_KILLS": 50},
        {"GATE_KILLS": 60, "GATE_ZERO_KILLS": 5},
        (
            ("training/opening.py", "    source.restore(state)\n", ""),
            ("training/state.py", "        self.optimizer.state.clear()\n", ""),
            ("training/checkpoint.py", "steps_on_disk(folder)[:-keep]:", "steps_on_disk(folder):"),
        ),
    ),
    "Z1": Gate(
        "two processes train the adapter of one; a kill, a signal or a full disk of one ends both, and loses nothing",
        _in("test_two_ranks.py"),
        {"GATE_RANK_KILLS": 20},
        {},
        (
            ("training/processes.py", "            all_reduce(flat)\n", ""),
            ("training/processes.py", "        if disagreeing:\n", "        if False:\n"),
            ("training/loop.py", "            if failed:\n", "            if False:\n"),
            (
                "training/loop.py",
                "self.processes.from_main(self.saver.finish)\n                self.saver.save(",
                "self.saver.save(",
            ),
            (
                "training/loop.py",
                '        if signals:\n            return "a signal',
                '        if False:\n            return "a signal',
            ),
        ),
    ),
    "T1": Gate(
        "a signal at any moment stops a run that resumes to the same bytes; an export is whole or not there",
        (
            *_in("test_kills.py", *SIGNALLED),
            f"{RELIABILITY}/test_exports.py::test_a_signal_during_an_export_leaves_all_or_nothing",
        ),
        {"GATE_SIGNALS": 100},
        {"GATE_SIGNALS": 9},
        (
            ("stopping.py", "            signal.signal(number, signal.SIG_DFL)\n", "            return\n"),
            ("stopping.py", "        if request.was_raised:\n", "        if False:\n"),
            ("training/loop.py", "or is_last or self._why_stop:", "or is_last:"),
        ),
    ),
    "PW1": Gate(
        "a power cut after any call of a save leaves the old state or the new one",
        _in("test_power.py"),
        {"GATE_CRASHES": 400, "GATE_TEARS": 30},
        {},
        (
            ("disk/durable.py", "CLOEXEC)\n    try:\n        os.fsync(handle)\n", "CLOEXEC)\n    try:\n        pass\n"),
            ("disk/durable.py", "CLOEXEC, 0o666)\n", "CLOEXEC, 0o666)\n    os.fsync = lambda handle: None\n"),
            (
                "disk/durable.py",
                "    os.rename(folder, dead)\n    sync_folder(folder.parent)\n",
                "    os.rename(folder, dead)\n",
            ),
            (
                "disk/durable.py",
                "    os.rename(stage, target)\n    sync_folder(target.parent)\n",
                "    os.rename(stage, target)\n",
            ),
            (
                "disk/durable.py",
                "    os.replace(partial, path)\n    sync_folder(path.parent)\n",
                "    os.replace(partial, path)\n",
            ),
        ),
    ),
    "F1": Gate(
        "a disk that is full or fails at any call costs the save that was being made and nothing else",
        _in("test_guards.py", *DISK),
        {"GATE_SIZES": 80, "GATE_ERRNOS": 40},
        {},
        (
            ("disk/durable.py", "isinstance(error, OSError) or number is None:", "True:"),
            (
                "disk/durable.py",
                "        _publish(stage, target)\n    finally:\n        shutil.rmtree(stage, ignore_errors=True)\n",
                "        _publish(stage, target)\n    finally:\n        pass\n",
            ),
            (
                "training/disk.py",
                "    except OSError as error:\n        why",
                "    except ZeroDivisionError as error:\n        why",
            ),
        ),
    ),
    "B1": Gate(
        "every changed bit, cut and edit of a checkpoint is found and the one before is used",
        _in("test_checkpoints.py", *DAMAGED),
        {"GATE_FLIPS": 10_000, "GATE_CUTS": 1_000},
        {"GATE_FLIPS": 300, "GATE_CUTS": 50},
        (
            ("disk/sealed.py", "    if not is_whole:", "    if False:"),
            ("disk/sealed.py", "hashlib.sha256(content).hexdigest() != entry[_HASH]:", "False:"),
            ("disk/sealed.py", "        if is_foreign(name):", "        if False:"),
            ("disk/sealed.py", " | os.O_NOFOLLOW | os.O_NONBLOCK", " | os.O_NONBLOCK"),
            (
                "training/checkpoint.py",
                '    if progress.step != int(folder.name.removeprefix("step-")):',
                "    if False:",
            ),
        ),
    ),
    "R0": Gate(
        "a resume from any step gives the same bytes",
        _in(
            "test_steps.py",
            "test_a_resume_from_every_step_gives_the_same_bytes",
            "test_no_two_rows_of_a_run_get_the_same_random_numbers",
            "test_recomputing_and_saving_change_no_byte_with_dropout",
        ),
        {"GATE_EVERY": 1},
        {},
        (
            ("training/loop.py", "self.progress.step * self.train.global_batch, self.capacity):", "0, self.capacity):"),
            (
                "training/loop.py",
                "        rows = self.mixture.rows(update *",
                "        rows = self.mixture.rows(id(self) % 7 *",
            ),
        ),
    ),
    "I1": Gate(
        "a resume in a changed world is refused by the field's name; what cannot matter passes",
        _in("test_identity.py"),
        {},
        {},
        (
            (
                "training/identity.py",
                "    for name in changed:\n        if name not in allowed:",
                "    for name in changed:\n        if False:",
            ),
            ("training/identity.py", "hash_of_rows(task) for task in tasks}", '"" for task in tasks}'),
            ("training/identity.py", "content_hash(task.path) for", '"" for'),
            ("training/identity.py", '"tokenizer": tokenizer_hash(tokenizer)', '"tokenizer": ""'),
            ("adapter_folder.py", "if before[name] != value and name not in allowed:", "if False:"),
        ),
    ),
    "N1": Gate(
        "a step that is not finite costs one step, three in a row stop the run, nothing of it is saved",
        (*_in("test_steps.py", *NUMBERS), f"{RELIABILITY}/test_checkpoints.py::test_what_is_not_finite_is_never_saved"),
        {"GATE_STEPS": 30},
        {},
        (
            (
                "training/loop.py",
                "if math.isfinite(loss) and math.isfinite(norm):\n            self.optimizer.step()",
                "if True:\n            self.optimizer.step()",
            ),
            ("training/numbers.py", "progress.bad_in_a_row >= MAX_BAD_IN_A_ROW or is_often", "is_often"),
            ("training/checkpoint.py", "    _refuse_not_finite(state)\n", ""),
            ("training/loop.py", "            self.progress.bad_in_a_row = 0\n", ""),
        ),
    ),
    "G1": Gate(
        "the split into micro batches changes a step by rounding only, with dropout",
        _in("test_steps.py", "test_the_split_into_micro_batches_changes_a_step_by_rounding_only"),
        {},
        {},
        (
            (
                "training/loop.py",
                "share, tokens = 1 / sum(row.num_labels for row in rows)",
                "share, tokens = 1 / sum(row.num_labels for row in rows[: self.micro_batch])",
            ),
            (
                "training/loop.py",
                "self._routing.rows, self._routing.lengths = part.keys,",
                "self._routing.rows, self._routing.lengths = part.keys[::-1],",
            ),
        ),
    ),
    "S1": Gate(
        "a checkpoint or adapter whose tensors are not the declared ones is refused; logits of a fresh process are equal",
        (
            *_in("test_checkpoints.py", INVENTORY),
            *_in(
                "test_exports.py",
                "test_an_adapter_gives_the_same_logits_in_a_fresh_process",
                "test_an_adapter_whose_tensors_are_not_those_of_its_config_is_refused_in_one_line",
                "test_an_inventory_that_lists_other_tensors_is_refused_in_one_line",
            ),
        ),
        {},
        {},
        (
            (
                "training/checkpoint.py",
                "            if entries.get(name) != there[file].get(name):",
                "            if False:",
            ),
            ("training/checkpoint.py", "    _compare(folder, {ADAPTER: adapter, OPTIMIZER: wanted}, declared)\n", ""),
            ("adapter_folder.py", '    if there != manifest["inventory"] or', "    if"),
            ("adapter_folder.py", " or there != _inventory(get_peft_model_state_dict(adapted)):", ":"),
            ("adapter_folder.py", '        if "size mismatch" not in str(error):', "        if True:"),
        ),
    ),
    "M1": Gate(
        "a merged export of constant gates answers as the adapter does, and its update is that of the adapter",
        _in("test_exports.py", "test_a_merge_of_constant_gates_answers_as_the_adapter_does"),
        {"GATE_MERGES": 200},
        {},
        (
            ("merging/folds.py", "alpha=static.scaling)", "alpha=0.97 * static.scaling)"),
            ("merging/writer.py", "narrow = exact.to(dtype)", "narrow = exact.to(torch.bfloat16).to(dtype)"),
        ),
    ),
    "W1": Gate(
        "of two runs in one folder one runs; a killed holder leaves no lock",
        _in("test_guards.py", "test_of_two_at_once_one_runs_and_a_killed_holder_leaves_no_lock"),
        {"GATE_PAIRS": 100},
        {"GATE_PAIRS": 5},
        (
            (
                "training/lock.py",
                "            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
                "            pass\n",
            ),
        ),
    ),
    "H1": Gate(
        "a step or an evaluation that ran out of memory is done again on smaller micro batches",
        _in(
            "test_steps.py",
            "test_a_step_that_ran_out_of_memory_is_done_again_on_smaller_micro_batches",
            "test_an_evaluation_that_ran_out_of_memory_is_done_again_on_smaller_micro_batches",
            "test_one_row_that_does_not_fit_stops_with_a_way_out",
        ),
        {},
        {},
        (
            (
                "training/loop.py",
                "                self.halve_micro_batch()\n                continue\n",
                "                self.halve_micro_batch()\n",
            ),
            (
                "training/loop.py",
                "self.micro_batch = self.progress.micro_batch = self.micro_batch // 2",
                "self.micro_batch = self.micro_batch // 2",
            ),
            ("training/loop.py", "        if self.micro_batch == 1:", "        if self.micro_batch == 0:"),
            ("training/held_out.py", "tried(lambda: _sums(training))", "(_sums(training), False)"),
        ),
    ),
    "C1": Gate(
        "every trainable tensor gets a gradient by the second step; frozen bytes are the same at the end",
        _in(
            "test_steps.py", "test_a_tensor_that_gets_no_gradient_is_named", "test_frozen_bytes_are_the_same_at_the_end"
        ),
        {},
        {},
        (
            ("training/numbers.py", "        if tensor.grad is None or is_still:", "        if False:"),
            (
                "training/loop.py",
                "            after_step(self.model)\n",
                "            after_step(self.model)\n            next(self.model.parameters()).data.flatten()[0] += 1\n",
            ),
        ),
    ),
    "U1": Gate(
        "a hung step ends the run, and nothing is saved after a device error",
        _in("test_guards.py", *WATCHED),
        {},
        {},
        (
            ("training/watchdog.py", "                self._last += now - before\n", "                pass\n"),
            ("memory/faults.py", "    return not is_out_of_memory(error) and any", "    return False and any"),
        ),
    ),
    "LG1": Gate(
        "a log that cannot be written stops nothing",
        _in("test_guards.py", "test_a_log_that_cannot_be_written_stops_nothing"),
        {},
        {},
        (
            (
                "training/journal.py",
                "        except (OSError, ValueError, RuntimeError) as error:",
                "        except ZeroDivisionError as error:",
            ),
        ),
    ),
}
