"""Every gate: its tests, what makes them long, and the guards whose loss must turn it red.

A gate on input is a function of `tests/safety/input_gates.py`; the others are tests that read their sizes from the
environment.
"""

from dataclasses import dataclass, field

from mutation import Mutant, always, doing, ignoring, instead, never, uncaught, unfinished, without

RELIABILITY = "tests/reliability"


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
    "test_a_process_that_computes_on_a_cpu_is_not_taken_for_hung",
    "test_on_a_gpu_processor_time_is_no_sign_of_life",
    "test_the_limit_is_that_of_training_however_short_held_out_batches_and_updates_are",
    "test_a_run_counts_only_micro_batches_of_training",
    "test_who_gives_up_says_where_a_resume_goes_on",
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

KEPT = "tests/safekeeping"


def _kept(file: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{KEPT}/{file}::{name}" for name in names) or (f"{KEPT}/{file}",)


GATES: dict[str, Gate] = {
    "K1": Gate(
        "a run killed at any moment ends with the same bytes and loses no saved step",
        _in("test_kills.py", KILLED, UNDER_ZERO, BEFORE),
        {"GATE_KILLS": 2000, "GATE_WORKERS": 1, "GATE_ZERO_KILLS": 50},
        {"GATE_KILLS": 60, "GATE_ZERO_KILLS": 5},
        (
            without("training/opening.py:restore", "restore"),
            without("training/updates.py:PlainUpdater.expected", "clear"),
            instead("training/checkpoint.py:save", "steps_on_disk", "keep", by="steps_on_disk(folder)"),
        ),
    ),
    "Z1": Gate(
        "two processes train the adapter of one; a kill, a signal or a full disk of one ends both, and loses nothing",
        _in("test_two_ranks.py"),
        {"GATE_RANK_KILLS": 20},
        {},
        (
            without("training/processes.py:Processes.sum_gradients", "all_reduce"),
            never("training/processes.py:Processes.refuse_other", "disagreeing"),
            instead("mixture/tuner.py:MixtureModel.after_step", "zeros_like", "key", by="self.routing.counts[key]"),
            never("training/loop.py:Training._whole_gradient", "failed"),
            never("training/loop.py:Training._reason", "signals"),
            without("training/loop.py:Training._save", "finish"),
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
            doing("stopping.py:StopRequest.note", "SIG_DFL", by="return"),
            never("stopping.py:listening", "was_raised"),
            instead(
                "training/loop.py:Training._after_step",
                "save_every",
                "_why_stop",
                by="done % self.train.save_every == 0 or is_last",
            ),
        ),
    ),
    "PW1": Gate(
        "a power cut after any call of a save leaves the old state or the new one",
        _in("test_power.py"),
        {"GATE_CRASHES": 400, "GATE_TEARS": 30},
        {},
        (
            without("disk/systems.py:_force", "fsync"),
            doing("disk/durable.py:write_file", "fsync", by="os.fsync = lambda handle: None"),
            without("disk/staged.py:remove_folder", "sync_folder"),
            without("disk/staged.py:_publish", "sync_folder"),
            without("disk/durable.py:write_bytes_atomically", "sync_folder"),
        ),
    ),
    "F1": Gate(
        "a disk that is full or fails at any call costs the save that was being made and nothing else",
        _in("test_guards.py", *DISK),
        {"GATE_SIZES": 80, "GATE_ERRNOS": 40},
        {},
        (
            always("disk/durable.py:save_pretrained", "isinstance"),
            unfinished("disk/staged.py:staged_folder", "remove_passing"),
            uncaught("training/disk_space.py:as_trouble", "OSError"),
        ),
    ),
    "B1": Gate(
        "every changed bit, cut and edit of a checkpoint is found and the one before is used",
        _in("test_checkpoints.py", *DAMAGED),
        {"GATE_FLIPS": 10_000, "GATE_CUTS": 1_000},
        {"GATE_FLIPS": 300, "GATE_CUTS": 50},
        (
            never("disk/sealed.py:unseal_text", "not"),
            ignoring("disk/sealed.py:read_listed", "hash_of_bytes"),
            never("disk/sealed.py:open_manifest", "is_foreign"),
            instead("disk/sealed.py:_read_at_most", "open_plain", by="os.open(path, os.O_RDONLY)"),
            never("training/checkpoint.py:read", "step"),
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
            instead("training/gradient.py:StepGradient.accumulate", "first_of", "step", by="0"),
            instead(
                "training/micro_batches.py:Course.first_of", "step", "rows_a_step", by="id(self) % 7 * self.rows_a_step"
            ),
        ),
    ),
    "I1": Gate(
        "a resume in a changed world is refused by the field's name; what cannot matter passes",
        _in("test_identity.py"),
        {},
        {},
        (
            never("training/identity.py:refuse_changed", "not in"),
            instead("training/identity.py:identity_of_inputs", "_hash_of_rows", "task", by="''"),
            instead("training/identity.py:identity_of_inputs", "content_hash", "path", by="''"),
            instead("training/identity.py:identity_of_inputs", "tokenizer_hash", "tokenizer", by="''"),
            never("adapter_folder.py:refuse_another_base", "!="),
        ),
    ),
    "NI1": Gate(
        "a resume under other threads or CPU instructions gives the same bytes, or is refused by name",
        _in("test_machine.py"),
        {"GATE_MACHINES": 1},
        {},
        (
            without("training/machine.py:take_machine", "set_num_threads"),
            never("training/machine.py:take_machine", "began"),
            instead("training/machine.py:_instructions", "join", by="torch.backends.cpu.get_cpu_capability()"),
            without("training/machine.py:repeatable", "set_num_threads"),
            ignoring("training/machine.py:take_machine", "allowed", as_if=True),
        ),
    ),
    "N1": Gate(
        "a step that is not finite costs one step, three in a row stop the run, nothing of it is saved",
        (*_in("test_steps.py", *NUMBERS), f"{RELIABILITY}/test_checkpoints.py::test_what_is_not_finite_is_never_saved"),
        {"GATE_STEPS": 30},
        {},
        (
            always("training/loop.py:Training._step", "isfinite"),
            instead("training/gradient.py:is_too_bad", "is_often", "bad_in_a_row", by="is_often"),
            without("training/checkpoint.py:save", "_refuse_not_finite"),
            without("training/loop.py:Training._update", "bad_in_a_row"),
        ),
    ),
    "G1": Gate(
        "the split into micro batches changes a step by rounding only, with dropout",
        _in("test_steps.py", "test_the_split_into_micro_batches_changes_a_step_by_rounding_only"),
        {},
        {},
        (
            instead(
                "training/gradient.py:StepGradient.accumulate",
                "count",
                "rows",
                by="(batches.objective.count(row) for row in rows[: batches.size])",
            ),
            instead("training/micro_batches.py:MicroBatches.tell_routers", "keys", by="part.keys[::-1]"),
        ),
    ),
    "S1": Gate(
        "a checkpoint or adapter of other tensors than the declared ones is refused; fresh logits are equal",
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
            never("training/checkpoint.py:_compare", "!="),
            without("training/checkpoint.py:read", "_compare", "wanted"),
            instead(
                "adapter_folder.py:load_adapter",
                "manifest",
                "_inventory",
                by="there != _inventory(get_peft_model_state_dict(adapted))",
            ),
            instead("adapter_folder.py:load_adapter", "manifest", "_inventory", by="there != manifest['inventory']"),
            always("adapter_folder.py:load_adapter", "not in"),
        ),
    ),
    "M1": Gate(
        "a merged export of constant gates answers as the adapter does, and its update is that of the adapter",
        _in("test_exports.py", "test_a_merge_of_constant_gates_answers_as_the_adapter_does"),
        {"GATE_MERGES": 200},
        {},
        (
            instead("merging/updated_weights.py:_low_rank.update", "scaling", by="0.97 * static.scaling"),
            instead("merging/updated_weights.py:_UpdatedWeight._narrow", "to", by="exact.to(torch.bfloat16).to"),
        ),
    ),
    "W1": Gate(
        "of two runs in one folder one runs; a killed holder leaves no lock",
        _in("test_guards.py", "test_of_two_at_once_one_runs_and_a_killed_holder_leaves_no_lock"),
        {"GATE_PAIRS": 100},
        {"GATE_PAIRS": 5},
        (never("disk/lock.py:_acquire", "lock_alone"),),
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
            without("training/loop.py:Training._whole_gradient", "continue"),
            doing("training/micro_batches.py:MicroBatches.halve", "progress", "2", by="self.size = self.size // 2"),
            never("training/micro_batches.py:MicroBatches.halve", "size", "1"),
            instead("training/held_out.py:HeldOut.losses", "until_it_fits", "_sums", by="self._sums(baselines)"),
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
            never("training/gradient.py:prove_flow", "is_still"),
            doing(
                "training/loop.py:Training._update",
                "after_step",
                by="after_step(self.batches.model); next(self.batches.model.parameters()).data.flatten()[0] += 1",
            ),
        ),
    ),
    "U1": Gate(
        "a hung step ends the run, one that computes does not, and nothing is saved after a device error",
        _in("test_guards.py", *WATCHED),
        {},
        {},
        (
            without("training/clock.py:Watchdog._watch", "_last", "before"),
            never("training/clock.py:Watchdog._watch", "BUSY"),
            ignoring("training/clock.py:Watchdog._watch", "is_on_cpu", as_if=True),
            doing("training/held_out.py:HeldOut.goes_on", "alive", by="self.watchdog.beat()"),
            doing("training/loop.py:Training._step", "alive", by="self.watchdog.beat()"),
            ignoring("memory/faults.py:is_lost", "not"),
        ),
    ),
    "DEL": Gate(
        "only what a sealed manifest of ours lists, and a run's own, is removed; anything else is kept and named",
        _kept("test_deletion.py"),
        {"GATE_LAYOUTS": 216},
        {"GATE_LAYOUTS": 40},
        (
            without("training/opening.py:check_folder", "refuse_what_is_not_the_runs"),
            without("disk/staged.py:remove_folder", "refuse_foreign"),
            never("disk/owned.py:foreign_in", "is_file"),
            never("safekeeping/inventory.py:_foreign_entry", "recipes"),
            never("disk/passing.py:is_left_behind", "getpid"),
            never("comparison/comparison_folder.py:ComparisonFolder._foreign", "COMPARISON"),
        ),
    ),
    "OUT": Gate(
        "no verb writes into what is sealed, a run's, a comparison's or a model's own, or over another kind of file",
        _kept("test_places.py"),
        {},
        {},
        (
            never("safekeeping/places.py:check_place", "inside"),
            never("safekeeping/places.py:check_place", "~"),
            never("safekeeping/places.py:check_file", "not", "begins"),
            never("safekeeping/places.py:_unsealed_holder", "_MODEL"),
            never("safekeeping/places.py:_holder", "identity"),
            never("safekeeping/places.py:check_new_folder", "any"),
            without("safekeeping/inventory.py:noted", "_note"),
        ),
    ),
    "TWO": Gate(
        "of two writers of one place one is refused; a kill at any call of a beginning does not block the same command",
        _kept("test_writers.py"),
        {"GATE_PAIRS": 200},
        {"GATE_PAIRS": 20},
        (
            uncaught("disk/staged.py:_take_name", "OSError"),
            ignoring("evaluation/answer_file.py:_is_cut_at_once", "startswith"),
            never("evaluation/answer_file.py:AnswerFile._unsealed", "seal", "!="),
            never("disk/lock.py:_refuse_foreign", "pid"),
            ignoring("disk/lock.py:_refuse_leased", "_is_touched"),
            instead("redact.py:_is_told", "fullmatch", "None", by="False"),
            instead(
                "redact.py:_values_without",
                "key",
                "items",
                by="{_without(k, secrets): v for k, v in content.items()}",
            ),
        ),
    ),
    "KEPT": Gate(
        "one static solution serves every export, and none is taken that was made of something else or changed",
        ("tests/merging/test_kept.py",),
        {},
        {},
        (
            never("merging/kept_updates.py:Shelf._found", "other"),
            instead("merging/kept_updates.py:Shelf.of", "MANIFEST", "read_bytes", by="hash_of_bytes(b'')"),
            without("merging/kept_updates.py:hash_of_rows", "tobytes"),
            uncaught("merging/kept_updates.py:Shelf._write", "InputRefused"),
            never("report/exports.py:verdict", "is_measured"),
        ),
    ),
    "PACE": Gate(
        "a signal is acknowledged at once, long work says how far it is, and no stream stops either",
        ("tests/test_stopping.py", "tests/test_pace.py"),
        {},
        {},
        (
            without("stopping.py:StopRequest.note", "_acknowledge"),
            never("stopping.py:_acknowledge", "stderr"),
            never("terminal/pace.py:showing", "stderr"),
            without("terminal/pace.py:Pace.advance", "tell"),
            never("terminal/pace.py:Pace.advance", "is_known"),
        ),
    ),
    "PLAN": Gate(
        "a plan is for the device that is there, leaves a reserve, and a resume goes on with the sums it began with",
        ("tests/memory/test_choices.py", "tests/training/test_fitting.py"),
        {},
        {},
        (
            instead("memory/place.py:Limit.usable", "size", "reserve", by="self.size"),
            never("memory/place.py:Place.of", "has_budget"),
            never("memory/place.py:Place.dtype", "is_here"),
            never("training/fitting.py:_fitting", "begun"),
            never("memory/choosing.py:Search.choose", "keeps_batch"),
        ),
    ),
    "WIN": Gate(
        "without what Windows lacks every module loads, and disk, locks and chat templates do as they do here",
        ("tests/portability/test_bare_system.py",),
        {},
        {},
        (
            never("disk/systems.py:_refuse_link", "is_symlink"),
            always("disk/systems.py:force_folder", "OPENS_FOLDERS"),
            uncaught("disk/systems.py:close_and_remove", "PermissionError"),
            uncaught("disk/staged.py:_rename_onto_empty", "FileExistsError"),
            uncaught("base/host_memory.py:give_back_large_blocks", "TypeError"),
            always("data/chat_template_child.py:_bound_memory", "resource"),
        ),
    ),
    "VER": Gate(
        "whatever happens to a file of a run is found within 5 s; a changed export is never answered from",
        _kept("test_verify.py"),
        {"GATE_EXPORT_FLIPS": 1000},
        {"GATE_EXPORT_FLIPS": 12},
        (
            without("evaluation/subject.py:open_subject", "verify_where_ours"),
            without("run_folder.py:open_run", "check_tokenizer_files"),
            never("safekeeping/inventory.py:_compare", "_is_as_listed"),
            never("disk/sealed.py:hash_of_plain_file", "S_ISREG"),
            never("safekeeping/verification.py:_verified", "_PARTS"),
            never("safekeeping/verification.py:_verified", "identity"),
        ),
    ),
    "LG1": Gate(
        "a log that cannot be written stops nothing",
        _in("test_guards.py", "test_a_log_that_cannot_be_written_stops_nothing"),
        {},
        {},
        (uncaught("training/journal.py:Journal._try", "OSError"),),
    ),
    "TX1": Gate(
        "an answer ends where the tokenizer, generation_config.json or the chat template ends it, and learns that end",
        (
            "tests/evaluation/test_ends.py",
            "tests/data/test_chat.py::test_an_answer_that_the_template_leaves_open_is_closed",
            "tests/report/test_preview.py::"
            "test_a_template_that_closes_turns_with_plain_text_is_named_with_what_would_do",
        ),
        {},
        {},
        (
            never("evaluation/ends.py:ends_of", "listed", "is not"),
            always("evaluation/ends.py:ends_of", "added_tokens_decoder"),
            without("evaluation/ends.py:ends_of", "signs", "add"),
            doing("evaluation/ends.py:Ends.settled", "cut", by="text = text"),
            instead("data/turns.py:Turns._closed", "content", "split", "1", by="message['content'].split(' ')[0]"),
            never("data/notes.py:_open_ends", "wording", "not in"),
        ),
    ),
    "TX2": Gate(
        "a prompt is worded as its task was trained, said in one line, and exports carry the template",
        ("tests/evaluation/test_wording.py",),
        {},
        {},
        (
            instead("evaluation/wording.py:_as_trained", "name", "tasks", "list", by="list(tasks)"),
            without("evaluation/wording.py:_as_trained", "sort"),
            never("evaluation/wording.py:_as_trained", "others"),
            doing("merging/__init__.py:_exported", "template_to_keep", by="pass"),
            never("data/formats.py:find_format", "template"),
            never("data/read.py:_Reading._pair", "turns", "is not"),
        ),
    ),
    "TX3": Gate(
        "a key of a row that changes what is learned is refused, any other that nothing reads is named",
        ("tests/data/test_row_keys.py",),
        {},
        {},
        (
            never("data/row_keys.py:unread_keys", "is_left_out"),
            never("data/row_keys.py:unread_keys_of_message", "_DETAILS"),
            ignoring("data/row_keys.py:unread_keys", "_MEDIA"),
            never("data/instruction.py:split", "system"),
            never("data/conversation.py:with_system", "content"),
            without("data/read.py:iterate_pairs", "note"),
        ),
    ),
    "TX4": Gate(
        "what is learned is prompt and completion joined; rows that the base cannot take are refused",
        (
            "tests/data/test_limits.py",
            "tests/data/test_chat.py::test_a_template_reads_the_time_that_its_run_began_at",
        ),
        {},
        {},
        (
            always("data/tokenise.py:Tokeniser.answers", "starts_word", "_adds_space"),
            never("data/limits.py:beyond", "positions"),
            never("data/limits.py:beyond", "largest"),
            without("training/run.py:_read_inputs", "check_limits"),
            never("data/limits.py:positions_of", "yarn"),
            never("data/chat_template_child.py:main", "clock", "is not"),
        ),
    ),
    "TX5": Gate(
        "an export reads the same in transformers 4 and 5",
        ("tests/merging/test_older_loaders.py",),
        {},
        {},
        (
            instead("merging/hf_folder.py:config_of", "_older_rope", "content", by="{}"),
            never("base/tokenizer.py:save_tokenizer", "TokenizersBackend"),
        ),
    ),
    "TX6": Gate(
        "a conversation's rows are its template's own tokens; answers alone are learned, none is left out unsaid",
        ("tests/data/test_templates.py",),
        {},
        {},
        (
            never("data/turns.py:Turns._turns", "startswith"),
            never("data/turns.py:Turns._start", "startswith"),
            always("data/turns.py:Turns._kept", "startswith"),
            instead("data/turns.py:Turns._rows", "min", "stop", by="stop"),
            never("data/turns.py:Turns._as_worded", "tools"),
            never("data/turns.py:Turns._as_worded", "_arguments", "not"),
            never("data/turns.py:Turns._as_worded", "_arguments", "len"),
            never("data/turns.py:Turns._refuse_left_out", "words_of", "role"),
            never("data/turns.py:Turns._remarks", "reasoning_content"),
            never("data/turns.py:Turns._remarks", "_dense"),
            always("data/turns.py:Turns._marked", "learned"),
            instead("data/tokenise.py:_marked", "stop", "waiting", "0", by="start >= waiting[0][0]"),
            instead("data/prepare.py:_hold_out", "sources", "is_held", by="np.resize(is_held, len(store))"),
            uncaught("data/chat_template_child.py:main", "TypeError"),
        ),
    ),
    "TX7": Gate(
        "a conversation means the same under every common spelling, and what has no meaning is refused in one line",
        ("tests/data/test_conversation.py",),
        {},
        {},
        (
            never("data/conversation.py:read_conversation", "_is_empty"),
            doing("data/conversation.py:read_conversation", "no message is learned", by="pass"),
            never("data/conversation.py:_read", "None", "role"),
            never("data/conversation.py:_read", "_CALLING"),
            never("data/conversation.py:_calls", "arguments", "isinstance", "dict", "not"),
            never("data/conversation.py:_is_learned", "bool", "not in"),
            never("data/conversation.py:_refuse_order", "tool"),
            never("data/conversation.py:_remarks", "last"),
            never("data/row_text.py:check_json", "Repeated"),
            never("data/row_text.py:check_json", "isfinite"),
            never("data/row_text.py:check_json", "depth"),
            uncaught("data/row_text.py:from_json", "BadRow"),
            never("data/prepare.py:_prepare_task", "UNLEARNED"),
        ),
    ),
    "TX8": Gate(
        "a document loses no token: each but its first is learned once, and the end token ends it",
        ("tests/data/test_text.py",),
        {},
        {},
        (
            instead("data/token_rows.py:TokenRows.in_pieces", "max_length", "1", by="self.max_length"),
            never("data/token_rows.py:TokenRows.where", "starts"),
            never("data/notes.py:_open_ends", "TEXT"),
            never("data/formats.py:find_format", "is_document"),
            never("data/file_rows.py:rows_of", "TEXT"),
            never("data/file_rows.py:_txt_rows", "MAX_ROW_BYTES"),
        ),
    ),
    "SP1": Gate(
        "a span outside of its text, over another or of an unknown adapter is refused, in rows and typed",
        (
            "tests/data/test_marked_spans.py::test_spans_that_will_not_do_are_refused_by_their_row_or_left_out_and_counted",
            "tests/data/test_marked_spans.py::test_spans_of_messages_that_will_not_do_are_refused",
            "tests/training/test_span_runs.py::test_spans_of_a_prompt_that_will_not_do_are_refused",
            "tests/training/test_span_runs.py::test_what_cannot_mark_spans_is_refused_in_one_line",
            "tests/mixture/test_span_gates.py::test_marks_that_are_missing_or_name_no_expert_are_refused",
        ),
        {},
        {},
        (
            never("data/spans.py:_span", "stop", "text"),
            never("data/spans.py:_span", "adapter", "names"),
            never("data/spans.py:_span", "place", "list"),
            never("data/spans.py:_span", "bool", "end"),
            never("data/spans.py:read_spans", "other", "one"),
            never("data/spans.py:signed", "strip"),
            never("evaluation/asked_spans.py:asked_spans", "name", "names"),
            never("evaluation/asked_spans.py:asked_spans", "answer_mark"),
            never("mixture/routing.py:Routing.marks_among", "most"),
        ),
    ),
    "DX1": Gate(
        "a run whose experts are DoRAs is not exported, and its experts never stand beside plain ones",
        (
            "tests/training/test_every_method.py::test_dora_experts_train_answer_and_go_on_from_where_they_stopped",
            "tests/composition/test_changed_experts.py::test_doras_and_plain_experts_do_not_stand_in_one_mixture",
        ),
        {},
        {},
        (
            never("merging/__init__.py:_refuse_unfit", "experts", "config"),
            never("composition/experts.py:_refuse_unlike", "kinds"),
        ),
    ),
    "CO1": Gate(
        "a folder that lacks a tensor, or whose configuration cannot be read, is refused by every operation of compose",
        (
            "tests/composition/test_changed_experts.py::test_a_folder_that_lacks_a_tensor_is_refused",
            "tests/composition/test_changed_experts.py::test_a_configuration_that_is_no_json_is_refused_before_it_is_read",
        ),
        {},
        {},
        (
            never("composition/experts.py:refuse_lacking", "key", "tensors"),
            uncaught("composition/__init__.py:_cut", "LookupError"),
            uncaught("composition/__init__.py:_sub", "LookupError"),
            without("composition/__init__.py:_sub", "refuse_lacking"),
        ),
    ),
}
