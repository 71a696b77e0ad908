"""Each rule that keeps a run from loss, broken alone in a copy of the program, makes the test fail
that is there for it.

Where a rule stands is found in the syntax tree, so that neither moved lines nor another layout of
the text touch it.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
LONGEST_S = 900  # for all tests that catch a mutant, on a busy machine
COPIED = ("emotion_train", "launch", "tests", "accelerate_configs")


class Mutant(NamedTuple):
    """`words` occur once in `place` of `page`; with `broken` instead of them the test `caught_by`
    fails.

    `place` is a function, a method (`Writer.claim`) or a constant of the module. Its text is that
    of `ast.unparse`: single quotes, one line a statement, no comments.
    """

    rule: str
    page: str
    place: str
    words: str
    broken: str
    caught_by: str


MUTANTS = [
    # weights kept unpacked
    Mutant(
        "what is kept unpacked leaves room for all that training takes",
        "emotion_train/sizing/fit.py",
        "unpacked_blocks",
        "usable_bytes(gpu_bytes) - taken.total - _LEFT_FREE",
        "usable_bytes(gpu_bytes) - taken.weights",
        "tests/emotion_train/sizing/test_fit.py::"
        "test_as_many_blocks_are_kept_unpacked_as_training_leaves_room_for",
    ),
    # Gemma 3
    Mutant(
        "a GGUF file stores what Gemma's norms multiply by, 1 more than transformers' weights",
        "emotion_train/model/load.py",
        "_gguf_weights",
        "tensor - 1",
        "tensor",
        "tests/emotion_train/model/test_gemma.py::test_a_gguf_file_computes_what_its_checkpoint_computes",
    ),
    Mutant(
        "Gemma's embedding is scaled",
        "emotion_train/model/load.py",
        "_fill_the_rest",
        "model.config.hidden_size ** 0.5",
        "1.0",
        "tests/emotion_train/model/test_load.py::test_plain_checkpoints_load_as_transformers_loads_them"
        "[gemma3_text]",
    ),
    # Qwen3.5's delta nets
    Mutant(
        "the convolution of a delta net begins anew with each post",
        "emotion_train/model/delta_net.py",
        "chunks_of",
        "classifier.config.linear_conv_kernel_dim - 1",
        "1",
        "tests/emotion_train/model/test_delta_net.py::"
        "test_posts_of_a_pack_are_computed_as_transformers_computes_each_alone[changes0]",
    ),
    Mutant(
        "each chunk of a post reads the state that its own chunks before it left",
        "emotion_train/model/delta_net.py",
        "delta_rule",
        "slice(start, start + then)",
        "slice(start + here - then, start + here)",
        "tests/emotion_train/model/test_delta_net.py::"
        "test_the_rule_in_chunks_is_that_of_one_token_at_a_time_in_each_post",
    ),
    Mutant(
        "a delta net is adapted where an attention is",
        "emotion_train/sizing/shape.py",
        "layer_names",
        "kind == QWEN3_5",
        "False",
        "tests/emotion_train/model/test_delta_net.py::"
        "test_a_delta_net_has_adapters_where_an_attention_has_them[targets0-of_delta_net0-of_attention0]",
    ),
    # reading ahead
    Mutant(
        "nothing is read ahead that a shallower model does not need",
        "emotion_train/bases/ahead.py",
        "BaseAhead._begin",
        "read_ahead(layers, ",
        "read_ahead(None, ",
        "tests/emotion_train/model/test_read_ahead.py::"
        "test_no_piece_is_read_ahead_that_a_shallower_model_does_not_need",
    ),
    # encoders
    Mutant(
        "the folder of a whole encoder knows of how many blocks it holds the first",
        "emotion_train/model/lora.py",
        "base_config_of",
        "replace(whole, layers=facts.layers, whole_layers=facts.whole_layers)",
        "whole",
        "tests/emotion_train/model/test_encoder.py::"
        "test_a_cut_encoder_is_transformers_own_of_so_many_blocks_also_from_its_folder[None-bert]",
    ),
    Mutant(
        "the bias of a head is a row of its label, too",
        "emotion_train/model/warm_start.py",
        "warm_state",
        "is_of_head(name)",
        "is_of_head(name) and name.endswith('weight')",
        "tests/emotion_train/training/test_encoders.py::test_a_run_trains_on_from_an_encoder[bert-full]",
    ),
    Mutant(
        "an encoder's tokens see what comes after them",
        "emotion_train/model/attention.py",
        "_exact",
        "causal and mask is None",
        "mask is None",
        "tests/emotion_train/model/test_encoder.py::"
        "test_alone_packed_and_padded_are_transformers_own_logits[bert-cls]",
    ),
    Mutant(
        "an encoder's window reaches forward as far as back",
        "emotion_train/model/attention.py",
        "_exact",
        "mask & (distance_LL >= 0) if causal else mask",
        "mask & (distance_LL >= 0)",
        "tests/emotion_train/model/test_encoder.py::"
        "test_alone_packed_and_padded_are_transformers_own_logits[modernbert-cls]",
    ),
    Mutant(
        "RoBERTa's first token has the position after the padding's",
        "emotion_train/model/encoder.py",
        "positions_of",
        "position_ids + config.pad_token_id + 1",
        "position_ids",
        "tests/emotion_train/model/test_encoder.py::"
        "test_alone_packed_and_padded_are_transformers_own_logits[roberta-cls]",
    ),
    Mutant(
        "the last token that closes a post stays when the post is cut",
        "emotion_train/data/tokenization.py",
        "PostTokenizer.cut",
        "self.end_id is None or ",
        "True or ",
        "tests/emotion_train/data/test_tokenization.py::"
        "test_an_encoder_s_posts_have_both_ends_and_keep_them_when_cut",
    ),
    Mutant(
        "an adapter's copies of an encoder's dropout draw by the same counters",
        "emotion_train/model/lora.py",
        "attach_lora",
        "module.current = current",
        "pass",
        "tests/emotion_train/model/test_encoder.py::test_dropout_and_gradients_do_not_depend_on_packing",
    ),
    Mutant(
        "biases and norms of an encoder that is trained whole do not decay",
        "emotion_train/training/engines.py",
        "Engine._adamw",
        "'weight_decay': 0.0",
        "'weight_decay': decay",
        "tests/emotion_train/training/test_encoders.py::"
        "test_biases_and_norms_of_a_whole_encoder_do_not_decay",
    ),
    Mutant(
        "a cut base's neighbouring blocks lie in two buffers",
        "emotion_train/model/gathered.py",
        "GatheredBlocks.cut",
        "self._buffers[self._blocks % 2]",
        "self._buffers[0]",
        "tests/emotion_train/model/test_gathered.py::"
        "test_a_block_is_whole_however_the_passes_follow_each_other",
    ),
    # the mean of the weights
    Mutant(
        "the mean of the weights is published, not those of the last step",
        "emotion_train/runs/checkpoint.py",
        "best_adapter",
        "AVERAGE if _has(entry, AVERAGE) else ADAPTER",
        "ADAPTER",
        "tests/emotion_train/training/test_averaging.py::"
        "test_the_mean_is_scored_saved_beside_the_weights_and_published",
    ),
    Mutant(
        "a state that is saved while the mean is scored has the weights",
        "emotion_train/training/averaging.py",
        "WeightAverage.lifted",
        "if not self._applied:",
        "if True:",
        "tests/emotion_train/training/test_averaging.py::"
        "test_a_state_that_is_saved_while_the_mean_is_scored_has_the_weights",
    ),
    # auxiliary posts
    Mutant(
        "a label that a post's source does not know is no part of its softmax",
        "emotion_train/model/loss.py",
        "weighted_loss_sum",
        "if masked:",
        "if False:",
        "tests/emotion_train/training/test_trainer.py::"
        "test_so_it_is_with_auxiliary_posts_whose_sources_know_some_of_the_labels",
    ),
    Mutant(
        "a text that is scored is no auxiliary post",
        "emotion_train/preparation/auxiliary.py",
        "AuxiliaryPosts._staying",
        "new_N = ~np.isin(rows.column('key0').to_numpy(), taken)",
        "new_N = np.ones(len(rows), bool)",
        "tests/emotion_train/preparation/test_auxiliary_posts.py::"
        "test_a_text_that_stands_elsewhere_is_no_auxiliary_post_and_of_its_own_rows_the_mean_stays",
    ),
    Mutant(
        "held-out posts are scored by the labels that are published",
        "emotion_train/model/head.py",
        "TrainedRows.forward",
        "if self.training:",
        "if True:",
        "tests/emotion_train/training/test_auxiliary_run.py::"
        "test_outside_of_training_the_head_is_that_of_the_main_labels_to_the_bit",
    ),
    # distillation
    Mutant(
        "a data set of other auxiliary posts is not taken for the same",
        "emotion_train/preparation/derived.py",
        "create_index",
        "not same_posts(read_index(store), made)",
        "read_index(store).splits != made.splits",
        "tests/emotion_train/preparation/test_auxiliary_posts.py::"
        "test_derived_data_sets_that_differ_in_auxiliary_posts_or_labels_alone_are_not_the_same",
    ),
    Mutant(
        "a published run of another data set teaches nobody",
        "emotion_train/runs/out_of_fold.py",
        "is_published",
        "entry.index_sha256 != index.sha256()",
        "False",
        "tests/launch/run/test_distil.py::test_teachers_of_another_data_set_teach_nobody",
    ),
    Mutant(
        "a published run of another request teaches nobody",
        "emotion_train/runs/out_of_fold.py",
        "is_published",
        "same_question_as_published(store, run_id, entry, config)",
        "None",
        "tests/launch/run/test_distil.py::test_teachers_of_another_request_teach_nobody",
    ),
    Mutant(
        "no job is started beside a living one of its name",
        "launch/up/jobs.py",
        "train_at_once",
        "living.get(job.name)",
        "None",
        "tests/launch/run/test_distil.py::"
        "test_stopped_anywhere_the_same_command_follows_what_is_alive_and_starts_what_is_not",
    ),
    # training on from an adapter
    Mutant(
        "an adapter to train on from is held against the weights of the base before the claim",
        "emotion_train/train.py",
        "_look_at_parent",
        "known_weights_sha256(base)",
        "None",
        "tests/emotion_train/training/test_train_on.py::"
        "test_other_weights_of_the_same_shapes_are_refused_before_the_run_is_claimed",
    ),
    Mutant(
        "a teacher is not trained on the fold that it answers",
        "emotion_train/preparation/folds.py",
        "write_fold",
        "np.flatnonzero(fold_N != fold)",
        "np.flatnonzero(fold_N >= 0)",
        "tests/launch/run/test_distil.py::test_no_post_is_scored_by_a_model_that_saw_it",
    ),
    # training on from an adapter, adapters that answer together
    Mutant(
        "a published head is trained on at the temperature of its training",
        "emotion_train/model/warm_start.py",
        "warm_state",
        "if temperature is not None:",
        "if False:",
        "tests/emotion_train/training/test_train_on.py::"
        "test_a_parent_without_a_temperature_is_taken_to_the_last_bit",
    ),
    Mutant(
        "rows of the head follow the names of the labels",
        "emotion_train/runs/parent.py",
        "ParentAdapter.places",
        "own.index(label) if label in own else None",
        "labels.index(label) if label in own else None",
        "tests/emotion_train/training/test_train_on.py::test_rows_of_the_head_follow_their_labels",
    ),
    Mutant(
        "each adapter computes its own repetition of the pack",
        "emotion_train/model/fused.py",
        "Adapters.add_to",
        "up_KOR.mT",
        "up_KOR.roll(1, 0).mT",
        "tests/emotion_train/model/test_ensemble.py::test_the_mean_of_logits_is_that_of_each_member_alone",
    ),
    # the report's posts, corrections, slices, push
    Mutant(
        "no text is in a report that shows none",
        "emotion_train/report/posts.py",
        "Chosen.wanted",
        "if self.examples:",
        "if True:",
        "tests/emotion_train/report/test_posts.py::test_without_examples_no_text_is_anywhere",
    ),
    Mutant(
        "texts of strangers are escaped",
        "emotion_train/report/post_pages.py",
        "_posts",
        "escape(shown(text))",
        "shown(text)",
        "tests/emotion_train/report/test_posts.py::"
        "test_texts_are_escaped_and_what_would_be_obeyed_is_spelled_out",
    ),
    Mutant(
        "a cell of the CSV is no formula",
        "emotion_train/report/posts.py",
        "Chosen.to_csv",
        "harmless(cell)",
        "cell",
        "tests/emotion_train/report/test_posts.py::"
        "test_doubted_posts_come_from_all_held_out_splits_and_go_into_a_csv",
    ),
    Mutant(
        "a label is doubted by what is usual where it is right",
        "emotion_train/evaluation/mislabelled.py",
        "_confident_N",
        "prob_NC >= usual_C - _SLACK",
        "prob_NC >= 0.5",
        "tests/emotion_train/evaluation/test_mislabelled.py::"
        "test_one_label_is_doubted_by_the_rule_of_confident_learning",
    ),
    Mutant(
        "a correction changes only the label that was corrected",
        "emotion_train/preparation/corrections.py",
        "Corrector._after",
        "elif codes == old:",
        "elif True:",
        "tests/emotion_train/preparation/test_corrections.py::test_what_fits_no_post_is_told_with_its_row",
    ),
    Mutant(
        "rows that contradict each other are refused",
        "emotion_train/preparation/corrections.py",
        "_refuse_contradictions",
        "!= (one.label, one.corrected)",
        "== ('', '')",
        "tests/emotion_train/preparation/test_corrections.py::test_contradictions_and_unknown_labels_are_refused",
    ),
    Mutant(
        "a slice is scored over the labels that it has",
        "emotion_train/report/slices.py",
        "_figures",
        "float(f1_C[has_C].mean())",
        "float(f1_C.mean())",
        "tests/emotion_train/report/test_posts.py::test_a_label_that_a_slice_lacks_does_not_count_against_it",
    ),
    Mutant(
        "a repository is private unless it is to be public",
        "launch/results/push.py",
        "_upload",
        "private=not public",
        "private=False",
        "tests/launch/results/test_push.py::"
        "test_the_adapter_and_its_card_are_one_commit_of_a_private_repository",
    ),
    Mutant(
        "no path of the machine that trained is pushed",
        "launch/results/push.py",
        "_ready",
        "None if name in _LOCAL else value",
        "value",
        "tests/launch/results/test_push.py::"
        "test_the_adapter_and_its_card_are_one_commit_of_a_private_repository",
    ),
    # exports
    Mutant(
        "an export's adapter is scaled",
        "emotion_train/exporting/merge.py",
        "Merge._merged",
        "alpha=self._scale",
        "alpha=1.0",
        "tests/emotion_train/test_export.py::test_the_weights_are_those_that_peft_merges",
    ),
    Mutant(
        "the index of an export comes last",
        "emotion_train/exporting/export.py",
        "_write",
        "written = write_weights(",
        "_create(store, INDEX, b'{}')\n            written = write_weights(",
        "tests/emotion_train/test_export.py::test_parts_come_first_and_the_index_last",
    ),
    Mutant(
        "padding is a token that no post ends with",
        "emotion_train/exporting/small_files.py",
        "_padding",
        "if id_ in never and id_ < rows",
        "if id_ < rows",
        "tests/emotion_train/test_export.py::test_padding_is_a_token_that_no_post_ends_with",
    ),
    Mutant(
        "a base of other weights is refused before anything is written",
        "emotion_train/exporting/export.py",
        "_Prepared.of",
        "weights_sha256=rows.weights_sha256()",
        "weights_sha256=None",
        "tests/emotion_train/test_export.py::test_another_base_is_refused_before_anything_is_written",
    ),
    Mutant(
        "a server is asked to cut posts",
        "emotion_train/exporting/served.py",
        "Served._of",
        "'truncate_prompt_tokens': self._max_length",
        "'truncate_prompt_tokens': None",
        "tests/emotion_train/exporting/test_served.py::test_a_server_s_probabilities_are_the_adapter_s",
    ),
    # environments
    Mutant(
        "a character that the output lacks is spelled out",
        "emotion_train/edges/streams.py",
        "_over",
        "old.errors if old.errors in _NEVER_FAIL else _NEVER_FAIL[0]",
        "old.errors",
        "tests/emotion_train/edges/test_streams.py::test_no_encoding_of_the_output_ends_a_program[latin-1]",
    ),
    Mutant(
        "settings that another launcher left are cleared",
        "launch/run/environment.py",
        "_is_foreign",
        "name.startswith(_SETTINGS) or",
        "False or",
        "tests/launch/run/test_environment.py::test_settings_of_another_launcher_are_cleared_and_named",
    ),
    Mutant(
        "what a trainer has started ends with the run",
        "launch/run/processes.py",
        "_kill",
        "kill_all_of(folder, spared)",
        "pass",
        "tests/launch/run/test_processes.py::test_what_a_trainer_has_started_ends_with_the_run",
    ),
    # S3 that answers otherwise
    Mutant(
        "a HEAD without a reason is asked once by GET",
        "emotion_train/storage/s3_answers.py",
        "with_reason",
        "status is None",
        "True or status is None",
        "tests/emotion_train/storage/test_odd_endpoints.py"
        "::test_a_head_without_a_reason_is_asked_once_more_and_once_only",
    ),
    Mutant(
        "an answer without an ETag is none of S3",
        "emotion_train/storage/s3_answers.py",
        "_doubt",
        "if status < 300 and operation in _WITH_ETAG:",
        "if False:",
        "tests/emotion_train/storage/test_odd_endpoints.py::test_a_web_server_is_not_taken_for_a_store",
    ),
    Mutant(
        "a fall-back that worked is kept",
        "emotion_train/storage/s3.py",
        "S3Store._reads_by_boto3",
        "self._fall_backs >= _ENOUGH_FALL_BACKS",
        "False",
        "tests/emotion_train/storage/test_odd_endpoints.py"
        "::test_where_only_boto3_trusts_a_certificate_obstore_is_asked_once",
    ),
    # labelling
    Mutant(
        "a part is created and never written again",
        "emotion_train/labelling/worker.py",
        "Worker._publish",
        "self._store.create(part_key(unit), path)",
        "self._store.write(part_key(unit), path)",
        "tests/emotion_train/labelling/test_worker.py::test_the_first_part_stays_whoever_comes_later",
    ),
    Mutant(
        "leases expire by the clock of the store",
        "emotion_train/labelling/leases.py",
        "Board.look",
        "store.now()",
        "time.time()",
        "tests/emotion_train/labelling/test_worker.py::test_leases_expire_by_the_clock_of_the_store",
    ),
    Mutant(
        "a summary counts parts of its own job alone",
        "emotion_train/labelling/part.py",
        "_facts",
        "(facts.job, facts.unit) != (job.id, number)",
        "False",
        "tests/emotion_train/labelling/test_worker.py::test_there_is_no_summary_before_every_part_is_whole",
    ),
    Mutant(
        "a range is of the bytes that were planned",
        "emotion_train/labelling/rows.py",
        "_copied",
        "summed.hexdigest() != unit.sha256",
        "False",
        "tests/emotion_train/labelling/test_worker.py::test_a_source_that_changes_while_it_is_labelled_is_refused",
    ),
    Mutant(
        "a worker that leaves frees its units",
        "emotion_train/labelling/worker.py",
        "Worker.run",
        "self.left = self.leases.release_all()",
        "self.left = 1",
        "tests/emotion_train/labelling/test_worker.py::test_a_worker_that_is_told_to_leave_frees_its_units_at_once",
    ),
    Mutant(
        "a lease that is over belongs to nobody",
        "emotion_train/labelling/leases.py",
        "Standing.holds",
        "now <= self.since + lease_s + _GRACE_S",
        "True",
        "tests/emotion_train/labelling/test_worker.py::test_leases_expire_by_the_clock_of_the_store",
    ),
    # several labels, thresholds, figures
    Mutant(
        "labels that are two posts off are mended",
        "emotion_train/preparation/label_sets.py",
        "shared_out",
        "plan.repair()",
        "pass",
        "tests/emotion_train/preparation/test_label_sets.py"
        "::test_a_label_that_the_first_passes_leave_two_posts_off_is_mended",
    ),
    Mutant(
        "hidden labels are told from wrong ones",
        "emotion_train/data/target_values.py",
        "_is_hidden",
        "word.strip().upper() == 'NONE'",
        "False",
        "tests/emotion_train/preparation/test_prepare_targets.py"
        "::test_labels_that_are_hidden_are_refused_by_what_they_are[several]",
    ),
    Mutant(
        "an interval that holds 0 shows no difference",
        "emotion_train/evaluation/comparison.py",
        "judged",
        " or paired.low <= 0 <= paired.high",
        "",
        "tests/emotion_train/evaluation/test_comparison.py"
        "::test_an_interval_that_holds_0_shows_no_difference",
    ),
    Mutant(
        "an adapter of format 2 says what it answers with",
        "emotion_train/model/facts.py",
        "_refuse_later",
        "facts.get('targets')",
        "facts.get('targets', 'one')",
        "tests/emotion_train/edges/test_damaged_documents.py"
        "::test_an_adapter_that_does_not_say_what_it_answers_with_is_refused",
    ),
    Mutant(
        "the figures of a report are of its labels",
        "emotion_train/report/schema.py",
        "Report._fits_its_targets",
        "_require_labels(self.labels, self.splits.values())",
        "pass",
        "tests/emotion_train/report/test_several.py::test_figures_of_other_targets_are_refused",
    ),
    Mutant(
        "a post is counted by the labels that it has",
        "emotion_train/evaluation/metrics.py",
        "f1_of_resample_SC",
        "drawn_SC(truth_KC & predicted_KC)",
        "drawn_SC(predicted_KC)",
        "tests/emotion_train/evaluation/test_metrics.py"
        "::test_a_thousand_labels_take_the_memory_of_those_that_posts_have",
    ),
    # hosted models
    Mutant(
        "an adapter's dollars come from labelling",
        "emotion_train/hosted/own_answers.py",
        "own_of_run",
        "posts_per_second=labelling or training or None",
        "posts_per_second=training or None",
        "tests/emotion_train/test_benchmark.py::test_several_labels_are_answered_by_a_set",
    ),
    Mutant(
        "the price of a training is that of its own device",
        "emotion_train/hosted/own_answers.py",
        "_price_of",
        "_fact(report, 'identity', 'device') != device",
        "False",
        "tests/emotion_train/test_benchmark.py"
        "::test_an_adapter_labels_at_the_training_s_price_where_it_has_the_same_device",
    ),
    Mutant(
        "cut answers make later calls smaller",
        "emotion_train/hosted/synthetic.py",
        "_Series.heard",
        "self.count //= 2",
        "pass",
        "tests/emotion_train/test_augment.py::test_cut_answers_make_a_label_s_later_calls_smaller",
    ),
    Mutant(
        "a label whose answers are always cut is given up",
        "emotion_train/hosted/synthetic.py",
        "_Series.heard",
        "0 if cut and all(cut) else",
        "",
        "tests/emotion_train/test_augment.py::test_a_label_whose_answers_are_always_cut_is_given_up",
    ),
    Mutant(
        "a cap on dollars is not passed",
        "emotion_train/hosted/money.py",
        "Ledger._affordable",
        "one.nano > left",
        "False",
        "tests/emotion_train/hosted/test_money.py"
        "::test_of_a_cap_as_much_as_it_allows_is_claimed_and_nothing_more",
    ),
    Mutant(
        "a request is claimed once",
        "emotion_train/hosted/money.py",
        "Ledger._affordable",
        "one.request in self._claim_of",
        "False",
        "tests/emotion_train/hosted/test_money.py"
        "::test_of_a_cap_as_much_as_it_allows_is_claimed_and_nothing_more",
    ),
    Mutant(
        "class weights count real posts only",
        "emotion_train/training/start.py",
        "start_trainer",
        "real_label_counts",
        "label_counts",
        "tests/emotion_train/hosted/test_augmented.py::test_a_training_weights_classes_by_real_posts",
    ),
    Mutant(
        "a key is hidden in what an endpoint says",
        "emotion_train/hosted/endpoints.py",
        "Key.hidden",
        "text = text.replace(part, _HIDDEN)",
        "pass",
        "tests/emotion_train/hosted/test_endpoints.py"
        "::test_a_key_comes_from_the_environment_and_shows_itself_nowhere",
    ),
    # posts read as they were meant
    Mutant(
        "a quote takes in no line that is a row",
        "emotion_train/sources/quotes.py",
        "Doubts._is_row",
        "return all(",
        "return False and all(",
        "tests/emotion_train/sources/test_delimited.py::test_a_quote_that_swallows_rows_is_refused_by_line",
    ),
    Mutant(
        "what makes the rest of a file unreadable is no bad row",
        "emotion_train/sources/delimited.py",
        "_quoted_rows",
        "if row.trouble not in (None, 'blank'):",
        "if False:",
        "tests/emotion_train/sources/test_delimited.py::test_an_open_quote_makes_a_file_unreadable",
    ),
    Mutant(
        "quotes escaped by backslashes are named",
        "emotion_train/sources/delimited.py",
        "_unreadable",
        "if any(",
        "if False and any(",
        "tests/emotion_train/sources/test_delimited.py::test_quotes_escaped_by_backslashes_are_named",
    ),
    Mutant(
        "in a TSV whose lines are rows quotes are letters",
        "emotion_train/sources/table_layout.py",
        "layout_of",
        "if file.quoting == 'auto' and delimiter == '\\t':",
        "if False:",
        "tests/emotion_train/sources/test_delimited.py::test_in_a_tsv_whose_lines_are_rows_quotes_are_letters",
    ),
    Mutant(
        "a label id is a position in the names of its file",
        "emotion_train/sources/arrow_columns.py",
        "_labels",
        "if names is not None and pa.types.is_integer(column.type):",
        "if False:",
        "tests/emotion_train/sources/test_open.py::test_class_encode_column_comes_out_as_it_went_in",
    ),
    Mutant(
        "names belong to the file that carries them",
        "emotion_train/sources/open.py",
        "_open_path",
        "_with_names(replace(file, encoding=choices.encoding, quoting=choices.quoting,"
        " header=choices.header), columns)",
        "replace(_with_names(replace(files[0], encoding=choices.encoding), columns), name=file.name,"
        " path=file.path, split=file.split, format=file.format)",
        "tests/emotion_train/sources/test_open.py::test_each_file_is_read_by_its_own_names[joy,fear,anger]",
    ),
    Mutant(
        "a missing label is no label",
        "emotion_train/sources/json_lines.py",
        "spelled",
        "isinstance(value, float) and math.isnan(value)",
        "False",
        "tests/emotion_train/sources/test_open.py::test_a_missing_label_is_no_label[NaN]",
    ),
    Mutant(
        "a number that YAML reads otherwise than a person is refused",
        "emotion_train/edges/bounded.py",
        "_Plain.clear_int",
        "if _UNCLEAR.fullmatch(node.value)",
        "if False",
        "tests/emotion_train/test_config.py::test_a_word_is_held_to_the_same[train.epochs=010]",
    ),
    Mutant(
        "the commented config loads to the defaults",
        "emotion_train/config_reference.py",
        "as_yaml",
        "_value(key.default)",
        "_value(key.name)",
        "tests/emotion_train/test_config_reference.py::test_the_yaml_file_loads_to_the_defaults",
    ),
    Mutant(
        "a wrong verb names the program that has it",
        "emotion_train/command_line.py",
        "require_verb",
        "if guesses[0] == f'{other} {word}':",
        "if False:",
        "tests/emotion_train/test_command_line.py::test_a_wrong_verb_is_led_to_the_right_one",
    ),
    # one writer at a time
    Mutant(
        "an entry is only created, in a bucket",
        "emotion_train/storage/s3.py",
        "S3Store._create_once",
        "Body=data, IfNoneMatch='*')",
        "Body=data)",
        "tests/emotion_train/storage/test_store.py::test_create_refuses_other_bytes_and_accepts_its_own[s3]",
    ),
    Mutant(
        "an entry is only created, in a folder",
        "emotion_train/storage/folder.py",
        "FolderStore.create",
        "os.link(temporary, path)",
        "os.replace(temporary, path)",
        "tests/emotion_train/runs/test_log.py::test_a_claim_fences_the_older_writer[folder]",
    ),
    Mutant(
        "the probe tells which of two writes stands",
        "emotion_train/runs/log.py",
        "require_conditional_writes",
        "honoured = False",
        "honoured = True",
        "tests/emotion_train/runs/test_log.py::test_a_store_that_ignores_conditions_is_refused_in_one_sentence",
    ),
    Mutant(
        "an entry of another incarnation fences",
        "emotion_train/runs/log.py",
        "Writer._own_entry_at",
        "if (there.nonce, there.incarnation) == (self.nonce, self.incarnation):",
        "if True:",
        "tests/emotion_train/runs/test_log.py::test_a_claim_fences_the_older_writer[folder]",
    ),
    Mutant(
        "the newest claim wins",
        "emotion_train/runs/log.py",
        "Writer.claim",
        "if not since:",
        "if since:",
        "tests/emotion_train/runs/test_log.py::test_of_several_claims_at_once_the_newest_wins_and_knows_all_before_it[folder]",
    ),
    Mutant(
        "a claim knows what came before it",
        "emotion_train/runs/log.py",
        "Writer.claim",
        "self.entries += tuple(since)",
        'self.entries += tuple(entry.model_copy(update={"kind": "claim"}) for entry in since)',
        "tests/emotion_train/runs/test_log.py::test_a_claim_sees_the_checkpoint_that_came_in_between[folder]",
    ),
    Mutant(
        "numbers have no gap",
        "emotion_train/runs/log.py",
        "Writer._append",
        "self._own[-1].seq + 1",
        "self._own[-1].seq + 2",
        "tests/emotion_train/runs/test_log.py::test_entries_come_back_in_order_with_their_schema[folder]",
    ),
    Mutant(
        "a gap is refused",
        "emotion_train/runs/log.py",
        "_count_entries",
        "if found == list(range(len(found))):",
        "if True:",
        "tests/emotion_train/runs/test_log.py::test_a_gap_in_the_log_is_refused[folder]",
    ),
    Mutant(
        "a published run is not claimed",
        "emotion_train/runs/log.py",
        "Writer.claim",
        "if (finals := [entry for entry in self.entries if entry.kind == 'final']):",
        "if (finals := [entry for entry in self.entries if False]):",
        "tests/emotion_train/runs/test_log.py::test_a_published_run_cannot_be_claimed[folder]",
    ),
    Mutant(
        "a run is published once",
        "emotion_train/runs/log.py",
        "Writer._append",
        "there.kind == 'final' or _facts",
        "_facts",
        "tests/emotion_train/runs/test_log.py::test_a_final_entry_that_came_late_is_not_repeated_with_other_parts",
    ),
    # 0 means published, and nothing outlives its launcher
    Mutant(
        "a 0 that nothing was published for is not believed",
        "emotion_train/processes/launcher_link.py",
        "run_as_trainer",
        "str(code or 1)",
        "_PUBLISHED if code == 0 else str(code)",
        "tests/emotion_train/processes/test_launcher_link.py::test_the_outcome_is_what_main_came_to",
    ),
    Mutant(
        "what is published stays so, whatever comes after",
        "emotion_train/processes/launcher_link.py",
        "report_published",
        "_write_first(Path(name), _PUBLISHED)",
        "pass",
        "tests/emotion_train/processes/test_launcher_link.py::test_the_outcome_is_what_main_came_to",
    ),
    Mutant(
        "only a final entry publishes",
        "emotion_train/training/job.py",
        "published",
        "entry.kind == 'final'",
        "True",
        "tests/emotion_train/training/test_exit_codes.py::test_nothing_but_a_final_entry_is_published",
    ),
    Mutant(
        "a reader that leaves ends no work",
        "emotion_train/edges/streams.py",
        "_Stream._lose",
        "if self.is_result:",
        "if True:",
        "tests/emotion_train/edges/test_streams.py::test_without_a_reader_the_work_goes_on_and_its_words_go_to_the_log",
    ),
    Mutant(
        "a closed stream is open before any file takes its number",
        "emotion_train/edges/streams.py",
        "hold",
        "closed = _open_what_is_closed()",
        "closed = set()",
        "tests/emotion_train/edges/test_streams.py::test_without_a_reader_the_work_goes_on_and_its_words_go_to_the_log",
    ),
    Mutant(
        "a broken socket is no reader that left",
        "emotion_train/errors.py",
        "exit_code",
        "except ReaderLeft:",
        "except (ReaderLeft, BrokenPipeError):",
        "tests/emotion_train/edges/test_streams.py::test_a_socket_that_breaks_is_no_reader_that_left",
    ),
    Mutant(
        "the launcher's lock is gone with it",
        "emotion_train/processes/launcher_link.py",
        "run_as_trainer",
        "end_with_launcher(_leave)",
        "pass",
        "tests/emotion_train/processes/test_launcher_link.py::test_a_trainer_ends_with_its_launcher_in_the_midst_of_anything[killed]",
    ),
    Mutant(
        "a process that no launcher started is left alone",
        "emotion_train/processes/launcher_link.py",
        "end_with_launcher",
        "if (name := os.environ.get(FOLDER_VARIABLE)):",
        "if (name := os.environ.get(FOLDER_VARIABLE, '/none')):",
        "tests/emotion_train/processes/test_launcher_link.py::test_a_trainer_without_a_launcher_is_left_alone",
    ),
    Mutant(
        "a start waits for its predecessor to leave the GPU",
        "emotion_train/training/room.py",
        "wait_for_room",
        "if enough or is_over:",
        "if True:",
        "tests/emotion_train/training/test_room.py::test_a_predecessor_that_leaves_is_waited_for_and_changes_no_setting",
    ),
    Mutant(
        "that wait has an end",
        "emotion_train/training/room.py",
        "wait_for_room",
        "if enough or is_over:",
        "if enough or time.monotonic() - began > 5:",
        "tests/emotion_train/training/test_room.py::test_what_is_still_held_after_the_wait_makes_the_micro_batch_smaller",
    ),
    Mutant(
        "where another start may hold a GPU it is counted whole before the claim",
        "emotion_train/train.py",
        "train",
        "whole_memory_of if look.owned else memory_of",
        "memory_of",
        "tests/emotion_train/training/test_room.py::test_a_run_that_another_start_has_claimed_counts_its_gpu_whole_and_waits_after_its_own_claim",
    ),
    Mutant(
        "a fenced trainer that is stuck is killed",
        "launch/run/processes.py",
        "_follow",
        "fenced_at is None and read_outcome(folder) == Fenced.exit_code",
        "False",
        "tests/launch/run/test_processes.py::test_a_fenced_trainer_that_is_stuck_is_killed[1]",
    ),
    Mutant(
        "a run that was taken over is noticed between two saves",
        "emotion_train/runs/saver.py",
        "Saver._next",
        "self._writer.require_ownership()",
        "pass",
        "tests/emotion_train/runs/test_saver.py::test_a_claim_by_another_is_noticed_while_nothing_is_saved",
    ),
    # an answer that is lost, late or repeated
    Mutant(
        "a refusal is read back",
        "emotion_train/storage/s3.py",
        "S3Store.create",
        "if self.holds(key, data):",
        "if False:",
        "tests/emotion_train/storage/test_store.py::test_create_knows_its_own_write_when_the_answer_was_lost",
    ),
    Mutant(
        "what stands there is compared with what was sent",
        "emotion_train/storage/s3.py",
        "S3Store.create",
        "if self.holds(key, data):",
        "if self.read(key):",
        "tests/emotion_train/storage/test_store.py::test_create_refuses_other_bytes_and_accepts_its_own[s3]",
    ),
    Mutant(
        "a refusal is ambiguous",
        "emotion_train/storage/s3_errors.py",
        "is_ambiguous",
        "status in (409, 412, 429) or",
        "status in (409, 429) or",
        "tests/emotion_train/runs/test_log.py::test_each_ambiguous_answer_to_an_entry_is_resolved_by_reading_back[done412]",
    ),
    Mutant(
        "an own entry that came late is taken over",
        "emotion_train/runs/log.py",
        "Writer._own_entry_at",
        "if (there.nonce, there.incarnation) == (self.nonce, self.incarnation):",
        "if False:",
        "tests/emotion_train/runs/test_log.py::test_a_newer_entry_goes_behind_the_one_that_came_late",
    ),
    Mutant(
        "an own entry that came late is not repeated",
        "emotion_train/runs/log.py",
        "Writer._append",
        "self._unanswered.append(there)",
        "pass",
        "tests/emotion_train/runs/test_log.py::test_an_entry_that_came_late_is_taken_for_its_own_and_not_repeated[1]",
    ),
    # uploads in parts
    Mutant(
        "an upload that may be at work is not aborted",
        "emotion_train/runs/retention.py",
        "_is_of_earlier",
        "int(owner[1]) < incarnation",
        "int(owner[1]) <= incarnation",
        "tests/emotion_train/runs/test_retention.py::"
        "test_an_upload_that_a_killed_start_left_goes_and_one_at_work_stays",
    ),
    Mutant(
        "a part that arrived counts only while it is there",
        "emotion_train/runs/log.py",
        "Writer.upload",
        "part not in self._arrived or not self._is_there(part)",
        "part not in self._arrived",
        "tests/emotion_train/runs/test_log.py::"
        "test_a_part_that_arrived_is_not_sent_again_unless_it_is_gone[folder]",
    ),
    # what is read is what was committed, and never more
    Mutant(
        "a part has the size of its entry",
        "emotion_train/runs/log.py",
        "_key_of_its_size",
        "if int(size) != part.bytes:",
        "if False:",
        "tests/emotion_train/runs/test_log.py::test_a_part_of_another_size_is_not_read",
    ),
    Mutant(
        "a part has the sha256 of its entry",
        "emotion_train/runs/log.py",
        "_verified",
        "if hashlib.sha256(data).hexdigest() != part.sha256:",
        "if False:",
        "tests/emotion_train/runs/test_log.py::test_a_part_that_was_replaced_is_refused[folder]",
    ),
    Mutant(
        "no more of a part is read than its entry says",
        "emotion_train/runs/log.py",
        "read_part",
        ", length=part.bytes + 1",
        "",
        "tests/emotion_train/runs/test_log.py::test_a_giant_that_takes_the_place_of_a_part_or_an_entry_is_not_read[folder]",
    ),
    Mutant(
        "an entry is not read beyond its limit",
        "emotion_train/runs/log.py",
        "_read_entry",
        "store.read_verified(key, verify, length=MAX_ENTRY_BYTES + 1)",
        "store.read_verified(key, verify)",
        "tests/emotion_train/runs/test_log.py::test_a_giant_that_takes_the_place_of_a_part_or_an_entry_is_not_read[folder]",
    ),
    Mutant(
        "a part stays in the run",
        "emotion_train/runs/log.py",
        "Part._stays_inside",
        "segment in ('', '.', '..')",
        "segment in ('', '.')",
        "tests/emotion_train/runs/test_log.py::test_a_part_cannot_leave_the_run[../x]",
    ),
    Mutant(
        "an entry names only its writer's folders",
        "emotion_train/runs/log.py",
        "_unsound",
        "if not part.key.startswith(own):",
        "if False:",
        "tests/emotion_train/runs/test_log.py::test_an_entry_with_unsafe_parts_is_refused_before_anything_is_read",
    ),
    Mutant(
        "no part takes the place of another",
        "emotion_train/runs/log.py",
        "first_collision",
        "if folded in files or folded in folders or parents & files:",
        "if False:",
        "tests/emotion_train/runs/test_log.py::test_an_entry_with_unsafe_parts_is_refused_before_anything_is_read",
    ),
    Mutant(
        "a part is never written again with other bytes",
        "emotion_train/runs/log.py",
        "Writer.upload",
        "str(path.parent / sha256[:12] / path.name)",
        "str(path)",
        "tests/emotion_train/runs/test_log.py::test_the_same_name_with_other_bytes_is_another_part[folder]",
    ),
    Mutant(
        "no link leads out of a folder",
        "emotion_train/storage/folder.py",
        "FolderStore._path",
        "os.path.realpath(path)]) != real_root",
        "real_root]) != real_root",
        "tests/emotion_train/storage/test_store.py::test_a_link_out_of_the_folder_is_refused_and_one_inside_or_to_the_folder_is_followed",
    ),
    # what is cleared away
    Mutant(
        "the newest three are kept",
        "emotion_train/runs/retention.py",
        "KEEP_NEWEST",
        "KEEP_NEWEST = 3",
        "KEEP_NEWEST = 2",
        "tests/emotion_train/runs/test_retention.py::test_without_keep_every_the_newest_three_and_the_best_are_left[folder]",
    ),
    Mutant(
        "the best is kept",
        "emotion_train/runs/retention.py",
        "kept_entries",
        "kept.append(best)",
        "pass",
        "tests/emotion_train/runs/test_retention.py::test_without_keep_every_the_newest_three_and_the_best_are_left[folder]",
    ),
    Mutant(
        "each k-th is kept",
        "emotion_train/runs/retention.py",
        "kept_entries",
        "kept += checkpoints[keep_every - 1::keep_every]",
        "pass",
        "tests/emotion_train/runs/test_retention.py::test_the_newest_three_the_best_and_each_kth_are_kept_and_no_entry_goes[folder]",
    ),
    Mutant(
        "no entry is deleted",
        "emotion_train/runs/retention.py",
        "collect",
        "    for key in doomed:\n",
        '    for key in [*doomed, "log/00000001.json"][: 99 if doomed else 0]:\n',
        "tests/emotion_train/runs/test_retention.py::test_the_newest_three_the_best_and_each_kth_are_kept_and_no_entry_goes[folder]",
    ),
    Mutant(
        "a newer writer's parts are left alone",
        "emotion_train/runs/retention.py",
        "removable",
        "if int(owner[1]) < incarnation or",
        "if int(owner[1]) != incarnation or",
        "tests/emotion_train/runs/test_retention.py::test_orphans_of_older_writers_go_and_those_of_newer_ones_and_its_own_stay[folder]",
    ),
    Mutant(
        "the first of equals stays the best",
        "emotion_train/runs/retention.py",
        "_best",
        "-entry.seq, entry)",
        "entry.seq, entry)",
        "tests/emotion_train/runs/test_retention.py::test_the_newest_three_the_best_and_each_kth_are_kept_and_no_entry_goes[folder]",
    ),
    # saving beside training
    Mutant(
        "the newest that waits wins",
        "emotion_train/runs/saver.py",
        "Saver._let_go",
        "kept = [one for one in self._waiting if one is newest or",
        "kept = [one for one in self._waiting if True or",
        "tests/emotion_train/runs/test_saver.py::test_the_newest_waiting_state_wins",
    ),
    Mutant(
        "what is in flight is not let go",
        "emotion_train/runs/saver.py",
        "Saver._let_go",
        "one is newest or one is self._in_flight or",
        "one is newest or",
        "tests/emotion_train/runs/test_saver.py::test_the_newest_waiting_state_wins",
    ),
    Mutant(
        "an evaluated state is not replaced",
        "emotion_train/runs/saver.py",
        "Saver._let_go",
        "or one.macro_f1 is not None]\n",
        "]\n",
        "tests/emotion_train/runs/test_saver.py::test_an_evaluated_state_is_never_replaced_by_a_newer_one",
    ),
    Mutant(
        "saved means committed",
        "emotion_train/runs/saver.py",
        "Saver.drain",
        "while self._waiting and self.failure is None",
        "while self._waiting[1:] and self.failure is None",
        "tests/emotion_train/runs/test_saver.py::test_what_is_committed_is_what_was_offered",
    ),
    Mutant(
        "a fenced writer's training ends",
        "emotion_train/runs/saver.py",
        "Saver.check",
        "raise self.failure",
        "return",
        "tests/emotion_train/runs/test_saver.py::test_a_writer_that_was_fenced_ends_and_writes_no_entry",
    ),
    Mutant(
        "a state is a copy",
        "emotion_train/training/trainer.py",
        "Trainer.state",
        "copies = checkpoint.host_copy({",
        "copies = dict({",
        "tests/emotion_train/training/test_resume.py::test_a_state_is_a_copy_that_later_steps_do_not_change",
    ),
    # going on
    Mutant(
        "training continues at the cursor",
        "emotion_train/training/trainer.py",
        "Trainer.fit",
        "self.train_loader.steps(epoch, first)",
        "self.train_loader.steps(epoch, max(0, first - 1))",
        "tests/emotion_train/training/test_resume.py::test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_as_if_it_had_not_been",
    ),
    Mutant(
        "the cursor is saved at the step of the state",
        "emotion_train/training/trainer.py",
        "Trainer.state",
        "history=list(self.progress.history),",
        "history=list(self.progress.history),\n            step=self.progress.step - 1,",
        "tests/emotion_train/training/test_resume.py::test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_as_if_it_had_not_been",
    ),
    Mutant(
        "dropout is drawn from seed and step, not from a stream with a memory",
        "emotion_train/training/trainer.py",
        "Trainer._dropout_key",
        "self.progress.step)",
        "int(torch.randint(2 ** 30, ())))",
        "tests/emotion_train/training/test_resume.py::test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_as_if_it_had_not_been",
    ),
    Mutant(
        "each rank has the dropout of the others",
        "emotion_train/training/trainer.py",
        "Trainer._dropout_key",
        "self.progress.step)",
        "self.progress.step + self.ranks.rank)",
        "tests/emotion_train/training/test_resume.py::test_dropout_is_another_one_for_each_seed_and_step_and_the_same_on_each_rank",
    ),
    Mutant(
        "each step has its own dropout",
        "emotion_train/training/trainer.py",
        "Trainer._dropout_key",
        "self.progress.step)",
        "0)",
        "tests/emotion_train/training/test_resume.py::test_dropout_is_another_one_for_each_seed_and_step_and_the_same_on_each_rank",
    ),
    Mutant(
        "a pack knows a post by its number in the split",
        "emotion_train/data/loader.py",
        "Loader._step",
        "numbers.append(int(self._order.first_posts[group]) + row)",
        "numbers.append(len(numbers))",
        "tests/emotion_train/data/test_loader.py::test_a_post_has_its_number_in_the_split_on_any_rank_and_in_any_pack",
    ),
    Mutant(
        "a pack knows a token by its position in its post",
        "emotion_train/data/packing.py",
        "Pack.places",
        "self.positions_T]",
        "np.arange(len(self.positions_T))]",
        "tests/emotion_train/data/test_packing.py::test_each_token_knows_its_post_and_its_position_in_it",
    ),
    Mutant(
        "posts that fill up a recording read no token beyond the pack",
        "emotion_train/model/encoder.py",
        "logits_of_posts",
        ".clamp(max=len(hidden_TH) - 1)",
        "",
        "tests/emotion_train/model/test_graphs.py::"
        "test_what_is_recorded_of_an_encoder_gives_the_gradients_of_its_packs[bert-cls-whole]",
    ),
    Mutant(
        "a pack with a graph adds to the gradients of packs without one",
        "emotion_train/model/graphs.py",
        "GraphedPasses._lend_sums",
        "torch._foreach_copy_(self._sums, held)",
        "torch._foreach_zero_(self._sums)",
        "tests/emotion_train/model/test_graphs.py::"
        "test_packs_with_and_without_a_graph_add_up_to_the_gradients_of_a_step[whole]",
    ),
    Mutant(
        "what is recomputed has the mask of its first pass",
        "emotion_train/model/dropout.py",
        "Current.around_checkpoints",
        "self.of(self._counters)",
        "nullcontext()",
        "tests/emotion_train/model/test_dropout.py::test_recomputation_after_other_packs_finds_the_same_mask",
    ),
    Mutant(
        "training with dropout and without counters is no training",
        "emotion_train/model/dropout.py",
        "required",
        "if counters is None:",
        "if False:",
        "tests/emotion_train/model/test_dropout.py::test_training_without_counters_is_refused",
    ),
    Mutant(
        "the moments of the optimizer come back",
        "emotion_train/training/trainer.py",
        "Trainer.restore",
        "self.engine.load_moments(state.optimizer, state.progress.step)",
        "pass",
        "tests/emotion_train/training/test_resume.py::test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_as_if_it_had_not_been",
    ),
    Mutant(
        "a fall-back is recorded",
        "emotion_train/training/job.py",
        "Claimed.fell_back",
        "self.writer.append('note', last.epoch",
        "(lambda *words: None)('note', last.epoch",
        "tests/emotion_train/training/test_resume.py::test_a_checkpoint_that_does_not_verify_is_passed_over_and_that_is_recorded",
    ),
    Mutant(
        "a store that does not answer is no reason to fall back",
        "emotion_train/runs/checkpoint.py",
        "_first_good",
        "except (Damaged, ObjectNotFound) as error:",
        "except Exception as error:",
        "tests/emotion_train/training/test_resume.py::test_a_store_that_does_not_answer_is_no_reason_to_fall_back",
    ),
    Mutant(
        "one read condemns nothing",
        "emotion_train/storage/second_look.py",
        "second_look",
        "if digest in refused:",
        "if True:",
        "tests/emotion_train/storage/test_second_look.py::test_nor_is_a_file_condemned_by_one_read_of_it",
    ),
    Mutant(
        "other bytes each time are no damage",
        "emotion_train/storage/second_look.py",
        "second_look",
        "if digest in refused:",
        "if refused:",
        "tests/emotion_train/storage/test_second_look.py::test_the_first_good_read_wins_and_the_first_repeated_one_condemns",
    ),
    Mutant(
        "the second look takes another way",
        "emotion_train/storage/s3.py",
        "S3Store._get",
        "look % 2 == 0 and",
        "True and",
        "tests/emotion_train/storage/test_second_look.py::test_a_second_look_takes_another_connection_another_client_and_no_cache",
    ),
    Mutant(
        "an object read whole has the sum of its ETag",
        "emotion_train/storage/s3.py",
        "S3Store._has_its_sum",
        "return False",
        "return True",
        "tests/emotion_train/storage/test_second_look.py::test_a_second_look_takes_another_connection_another_client_and_no_cache",
    ),
    Mutant(
        "a run is not begun anew when no checkpoint verifies",
        "emotion_train/runs/checkpoint.py",
        "_first_good",
        "    if entries:\n        raise",
        "    if False:\n        raise",
        "tests/emotion_train/training/test_resume.py::test_a_run_of_which_no_checkpoint_verifies_is_not_begun_anew",
    ),
    Mutant(
        "a state of this machine is not put behind a newer one",
        "emotion_train/training/claim.py",
        "_prefer_local",
        " and (found.newest is None or place(entry) > place(found.newest.entry)):",
        ":",
        "tests/emotion_train/training/test_resume.py::test_of_the_states_on_this_machine_only_those_newer_than_the_log_are_put_into_it",
    ),
    Mutant(
        "where a run stands is looked up after the claim",
        "emotion_train/training/claim.py",
        "_find_state",
        "checkpoint.newest(found.writer.entries, lambda",
        "checkpoint.newest(found.writer.entries[:-1], lambda",
        "tests/emotion_train/training/test_resume.py::test_what_an_older_writer_commits_before_the_claim_is_gone_on_from",
    ),
    # what is promised of the log, the saves and the result
    Mutant(
        "nothing goes behind a log that was deleted",
        "emotion_train/runs/log.py",
        "Writer._append",
        "self._require_log()",
        "pass",
        "tests/emotion_train/runs/test_log.py::test_nothing_is_added_to_a_log_that_was_deleted[folder]",
    ),
    Mutant(
        "an entry is sent once an attempt",
        "emotion_train/storage/s3.py",
        "S3Store._connect",
        "_Connection(patient, client(1), ",
        "_Connection(patient, client(PATIENT_ATTEMPTS), ",
        "tests/emotion_train/storage/test_faults_on_the_way.py::test_an_entry_is_sent_once_an_attempt",
    ),
    Mutant(
        "checkpoints come by time",
        "emotion_train/training/trainer.py",
        "Trainer._exchange",
        ">= every:",
        ">= every and False:",
        "tests/emotion_train/training/test_resume.py::test_each_save_costs_a_stall_that_is_part_of_the_training_time",
    ),
    Mutant(
        "checkpoints come by steps",
        "emotion_train/training/trainer.py",
        "Trainer._due_by_steps",
        "due = every is not None and self.progress.step % every == 0 and (not self._evaluation_due())",
        "due = every is not None and False",
        "tests/emotion_train/training/test_resume.py::test_checkpoints_come_by_steps_too",
    ),
    Mutant(
        "what the bucket does not take waits on this machine",
        "emotion_train/runs/saver.py",
        "Saver._failed",
        "kept = self.keep_what_waits()",
        "kept = ''",
        "tests/emotion_train/runs/test_saver.py::test_a_local_folder_that_cannot_be_written_is_said_and_ends_nothing",
    ),
    Mutant(
        "a failing save is told of again",
        "emotion_train/runs/saver.py",
        "Saver._failed",
        "if self._patience.may_tell():",
        "if self._patience._told is None and self._patience.may_tell():",
        "tests/emotion_train/runs/test_saver.py::test_a_failed_attempt_is_told_of_again_and_again_but_not_more_often_than_once_a_minute",
    ),
    Mutant(
        "what is not published does not end with 0",
        "emotion_train/training/finish.py",
        "_until_the_store_takes_it",
        "raise _not_published(job, error, keep()) from error",
        "return None, None",
        "tests/emotion_train/training/test_recovery.py::test_what_cannot_be_published_is_kept_here_and_the_command_that_is_named_publishes_it",
    ),
    Mutant(
        "a pickle is not pulled",
        "emotion_train/runs/published.py",
        "require_pullable",
        "not in _ALLOWED_SUFFIXES and",
        'not in {*_ALLOWED_SUFFIXES, ".pt", ".bin", ".pkl"} and',
        "tests/launch/results/test_pull.py::test_unsafe_parts_are_refused[final/00000000/adapter/model.pt-pickles]",
    ),
    Mutant(
        "the filter of the training texts is pulled only when it is asked for",
        "emotion_train/runs/published.py",
        "download",
        "is not None and with_training_filter:",
        "is not None:",
        "tests/launch/results/test_pull.py::test_the_training_filter_is_pulled_only_when_it_is_asked_for[folder]",
    ),
    Mutant(
        "what a cache holds is hashed before it is used",
        "emotion_train/runs/adapter_cache.py",
        "_is_file",
        "== wanted.sha256",
        "!= ''",
        "tests/emotion_train/runs/test_adapter_cache.py::test_what_is_damaged_in_the_cache_is_pulled_again[folder-changed]",
    ),
    Mutant(
        "an adapter of a writer that did not publish is not used",
        "emotion_train/runs/adapter_cache.py",
        "find_adapter",
        "finals[-1:] != [int(in_a_run['incarnation'])]",
        "not finals",
        "tests/emotion_train/runs/test_adapter_cache.py::test_the_adapter_of_a_writer_that_did_not_publish_is_refused[folder]",
    ),
    Mutant(
        "time left is not judged by the steps of another process",
        "emotion_train/progress.py",
        "ProgressLine._seconds_left",
        "(done - first)",
        "done",
        "tests/emotion_train/test_progress.py::test_a_log_gets_a_line_every_30_s_with_share_time_left_and_the_last_words",
    ),
    # when the machine goes
    Mutant(
        "a rebalance saves",
        "emotion_train/processes/interruption.py",
        "_KINDS",
        "'rebalance': Signal.REBALANCE",
        "'rebalance': Signal.NONE",
        "tests/emotion_train/training/test_resume.py::test_a_rebalance_notice_saves_and_trains_on",
    ),
    Mutant(
        "a notice is said once",
        "emotion_train/processes/interruption.py",
        "Interruptions._news",
        "if notice is None or notice.serial == self._said:",
        "if notice is None:",
        "tests/emotion_train/training/test_resume.py::test_a_rebalance_notice_saves_and_trains_on",
    ),
    Mutant(
        "the kill is waited for",
        "emotion_train/processes/interruption.py",
        "Interruptions.hold",
        "(any_going and time_over)",
        "any_going",
        "tests/emotion_train/training/test_resume.py::test_the_hold_lasts_as_long_as_asked",
    ),
    Mutant(
        "SIGINT ends a hold",
        "emotion_train/processes/interruption.py",
        "Interruptions.hold",
        "if any_left or (",
        "if False or (",
        "tests/emotion_train/training/test_resume.py::test_sigint_ends_a_hold_at_once",
    ),
    Mutant(
        "a termination may be withdrawn",
        "emotion_train/processes/interruption.py",
        "Interruptions.hold",
        "going = kind in ('terminate', 'sigterm')",
        "going = True",
        "tests/emotion_train/training/test_resume.py::test_a_termination_that_is_withdrawn_is_waited_for_and_training_goes_on[False]",
    ),
    Mutant(
        "who goes saves first",
        "emotion_train/training/trainer.py",
        "Trainer._answer",
        "if signals & (GOING | Signal.REBALANCE | Signal.SAVE):",
        "if signals & (Signal.REBALANCE | Signal.SAVE):",
        "tests/emotion_train/training/test_resume.py::test_a_run_that_must_go_saves_the_step_it_is_at_and_leaves_with_33[sigterm]",
    ),
    Mutant(
        "who goes waits for the commit",
        "emotion_train/training/trainer.py",
        "Trainer._wait_until_saved",
        "if not self.saver.drain(_KEEP_LOCALLY_AFTER_S):",
        "if False:",
        "tests/emotion_train/training/test_resume.py::test_a_run_that_must_go_saves_the_step_it_is_at_and_leaves_with_33[sigterm]",
    ),
    Mutant(
        "an evaluation listens too",
        "emotion_train/training/trainer.py",
        "Trainer.score",
        "signals = self._exchange()",
        "signals = Signal.NONE",
        "tests/emotion_train/training/test_resume.py::test_a_run_that_must_go_while_it_evaluates_repeats_the_evaluation",
    ),
    Mutant(
        "another writer ends the training",
        "emotion_train/training/trainer.py",
        "Trainer._exchange",
        "if signals & (Signal.FENCED | Signal.FAILED):",
        "if False:",
        "tests/emotion_train/training/test_resume.py::test_another_writer_ends_the_run_at_the_next_step",
    ),
    Mutant(
        "a second SIGINT leaves at once",
        "emotion_train/processes/notices.py",
        "PreemptionWatch._on_signal",
        "os._exit(1)",
        "pass",
        "tests/emotion_train/processes/test_notices.py::test_a_second_sigint_leaves_at_once_and_one_that_came_twice_is_one",
    ),
    Mutant(
        "a signal outranks the cloud",
        "emotion_train/processes/notices.py",
        "PreemptionWatch.notice",
        "return self._signal or self._cloud",
        "return self._cloud or self._signal",
        "tests/emotion_train/processes/test_notices.py::test_a_signal_is_a_notice_that_no_cloud_takes_back[15-sigterm]",
    ),
    Mutant(
        "an expired token is renewed",
        "emotion_train/processes/notices.py",
        "Aws._read",
        "if answer.status != 401:",
        "if True:",
        "tests/emotion_train/processes/test_notices.py::test_an_expired_token_of_aws_is_renewed",
    ),
    Mutant(
        "an advice is news once",
        "emotion_train/processes/notices.py",
        "PreemptionWatch._found",
        "self._advised.add(sighting)",
        "pass",
        "tests/emotion_train/processes/test_notices.py::test_a_rebalance_is_said_once_and_a_termination_outranks_it",
    ),
    Mutant(
        "GCP holds the question open",
        "emotion_train/processes/notices.py",
        "Gcp.look",
        "if self._etag is not None:",
        "if False:",
        "tests/emotion_train/processes/test_notices.py::test_gcp_holds_the_question_open_until_there_is_news",
    ),
    Mutant(
        "Azure's first answer is waited for",
        "emotion_train/processes/notices.py",
        "Azure.look",
        "self._headers, _AZURE_FIRST_ANSWER_S)",
        "self._headers, _ANSWER_S)",
        "tests/emotion_train/processes/test_notices.py::test_a_slow_first_answer_of_azure_is_waited_for",
    ),
    Mutant(
        "an event of Azure names its machine",
        "emotion_train/processes/notices.py",
        "Azure._is_about_this_machine",
        "self._name.lower() in resources",
        "True",
        "tests/emotion_train/processes/test_notices.py::test_what_an_event_of_azure_means_for_this_machine[vm-1-event2-None]",
    ),
    Mutant(
        "under SkyPilot the hold is 300 s",
        "emotion_train/processes/notices.py",
        "hold_seconds",
        "return SKYPILOT_HOLD_S if",
        "return 0.0 if",
        "tests/emotion_train/processes/test_notices.py::test_the_hold_is_300_s_under_skypilot_and_what_is_configured_wins",
    ),
    Mutant(
        "the first outcome stands",
        "emotion_train/processes/launcher_link.py",
        "_write_first",
        "os.symlink(outcome, folder / _OUTCOME)",
        "(folder / _OUTCOME).unlink(missing_ok=True), os.symlink(outcome, folder / _OUTCOME)",
        "tests/emotion_train/processes/test_launcher_link.py::test_the_first_rank_that_ends_says_what_it_came_to",
    ),
    Mutant(
        "torchelastic does not see 33 and 34",
        "emotion_train/processes/launcher_link.py",
        "_AGREED",
        "_AGREED = (33, 34)",
        "_AGREED = ()",
        "tests/emotion_train/processes/test_launcher_link.py::test_the_outcome_is_what_main_came_to",
    ),
    Mutant(
        "the launcher returns the trainer's code",
        "launch/run/processes.py",
        "run_to_end",
        "return int(code)",
        "return process.returncode",
        "tests/launch/run/test_processes.py::test_the_trainer_s_own_code_is_returned",
    ),
    Mutant(
        "the launcher survives SIGTERM",
        "launch/run/processes.py",
        "_listening",
        "before = {number: signal.signal(number, signals.came) for number in wanted}",
        "before = {}",
        "tests/launch/run/test_processes.py::test_what_needs_no_second_start_holds_nobody[0]",
    ),
    Mutant(
        "a signal is passed on once",
        "launch/run/processes.py",
        "_follow",
        "if (trainer, number) not in told:",
        "if True:",
        "tests/launch/run/test_processes.py::test_a_signal_reaches_the_trainer_once",
    ),
    Mutant(
        "33 is the trainer's own word",
        "launch/run/processes.py",
        "run_to_end",
        "            say(_NO_WORD if trainers_started(folder) else _why_none_started(process.returncode))\n",
        "            return 33\n",
        "tests/launch/run/test_processes.py::test_a_trainer_that_overstays_is_killed_and_33_is_not_claimed_for_it",
    ),
    Mutant(
        "a failure on a machine that goes waits for its end",
        "launch/run/processes.py",
        "run_to_end",
        "            _hold(signals, hold_s)\n",
        "            pass\n",
        "tests/launch/run/test_processes.py::test_a_trainer_that_fails_on_a_machine_that_goes_ends_no_hold",
    ),
    # a prepared data set
    Mutant(
        "an object's name holds a hash of its bytes",
        "emotion_train/preparation/shards.py",
        "SplitWriter._close_object",
        "-{sha256[:16]}.parquet",
        ".parquet",
        "tests/emotion_train/data/test_objects_in_store.py::test_of_two_sources_at_once_the_winner_s_data_set_stays_whole[folder]",
    ),
    Mutant(
        "an object with other bytes is not taken over",
        "emotion_train/preparation/shards.py",
        "place",
        "if store.holds(key, path):",
        "if True:",
        "tests/emotion_train/data/test_objects_in_store.py::test_an_object_without_an_index_that_is_not_what_its_name_says_is_refused[folder]",
    ),
    Mutant(
        "the loser of a race compares its data set with the winner's",
        "emotion_train/preparation/existing.py",
        "_refuse_another",
        "if _content(existing) == _content(index):",
        "if True:",
        "tests/emotion_train/data/test_objects_in_store.py::test_of_two_sources_at_once_the_winner_s_data_set_stays_whole[folder]",
    ),
    Mutant(
        "every object is looked at before a data set is said to be there",
        "emotion_train/preparation/existing.py",
        "restore",
        "found = look_at_objects(store, existing)",
        "found = look_at_objects(store, existing.model_copy(update={'splits': {}}))",
        "tests/emotion_train/data/test_objects_in_store.py::test_missing_objects_are_written_anew_and_counted[folder]",
    ),
    Mutant(
        "of several labels the one of most rows wins",
        "emotion_train/data/conflicts.py",
        "choose",
        "if policy == 'majority' else",
        "if False else",
        "tests/emotion_train/data/test_conflicts.py::test_each_row_has_the_fate_that_loops_over_the_rows_give_it",
    ),
    Mutant(
        "of several annotators a label stays that half of them gave",
        "emotion_train/data/target_columns.py",
        "PostTargets.joined",
        "2 * votes >= members_G[group]",
        "2 * votes > members_G[group]",
        "tests/emotion_train/preparation/test_prepare_targets.py"
        "::test_annotators_become_shares_or_the_labels_that_half_gave[True]",
    ),
    Mutant(
        "an annotator has one vote",
        "emotion_train/preparation/annotations.py",
        "joined",
        "counts_N[answers[_changes(answers, post_N, column['annotator'])]] = True",
        "counts_N[answers] = True",
        "tests/emotion_train/preparation/test_prepare_targets.py::test_an_annotator_has_one_vote",
    ),
    Mutant(
        "a weight of 0 is refused",
        "emotion_train/data/target_values.py",
        "weights_of",
        "~(weight_N > 0)",
        "weight_N < 0",
        "tests/emotion_train/preparation/test_prepare_targets.py::test_a_weight_that_is_no_number_above_0_is_refused[0]",
    ),
    # what others wrote
    Mutant(
        "an index that was edited by hand is refused",
        "emotion_train/storage/document.py",
        "read_manifest",
        "document.pop(DIGEST, None) != digest_of(document)",
        "document.pop(DIGEST, None) is None",
        "tests/emotion_train/data/test_index.py::test_an_edit_by_hand_is_seen_by_the_digest[seed]",
    ),
    Mutant(
        "label counts of the index are compared with the posts",
        "emotion_train/data/reader.py",
        "RowGroupReader._read",
        "_refuse_other_counts(rows, group.stored)",
        "pass",
        "tests/emotion_train/data/test_index.py"
        "::test_label_counts_are_compared_with_the_posts_when_they_are_first_read[2]",
    ),
    # short runs, and what a run costs
    Mutant(
        "the last step is evaluated wherever it lies",
        "emotion_train/training/trainer.py",
        "Trainer._evaluation_due",
        "step == self.steps or",
        "",
        "tests/emotion_train/training/test_trainer.py"
        "::test_a_run_of_so_many_steps_ends_within_an_epoch_with_a_scored_checkpoint",
    ),
    Mutant(
        "a run is not resumed on another part of its data",
        "emotion_train/runs/question.py",
        "_FIXED",
        "'data.limit', ",
        "",
        "tests/emotion_train/training/test_trainer.py::test_a_run_is_not_continued_as_another_run[data.limit=60]",
    ),
    Mutant(
        "a part of a data set has the shares of its labels",
        "emotion_train/data/index.py",
        "_first_of",
        "left = _shares(tuple(map(int, split.label_counts)), rows)",
        "left = list(map(int, split.label_counts))",
        "tests/emotion_train/data/test_index.py"
        "::test_a_limited_split_has_so_many_posts_in_the_shares_of_its_labels[17]",
    ),
    Mutant(
        "after a real preemption the scheduler makes the second start",
        "launch/run/smoke.py",
        "rehearse",
        "or saved[-1].step < half",
        "",
        "tests/launch/run/test_smoke.py::test_nothing_follows_a_start_that_failed_or_was_really_preempted[end4]",
    ),
    Mutant(
        "of what may be this machine the dearest counts",
        "launch/run/machine_price.py",
        "_of_catalog",
        "return max(known",
        "return min(known",
        "tests/launch/run/test_machine_price.py"
        "::test_a_machine_of_aws_costs_what_the_catalog_says_of_its_type_place_and_way[spot-use1-az9-0.3]",
    ),
    Mutant(
        "where nothing is known about dollars the smallest GPU comes first",
        "launch/plan/choices.py",
        "_order",
        "choice.count * choice.kind.gb",
        "choice.count * choice.hours",
        "tests/launch/plan/test_plan.py::test_without_prices_the_plan_has_hours_and_says_so",
    ),
    Mutant(
        "no library learns of programs that a base names",
        "emotion_train/bases/files.py",
        "BaseFiles.config",
        "_without_code(object_file(path))",
        "object_file(path)",
        "tests/test_no_remote_code.py::test_a_base_of_a_known_architecture_loads_without_its_programs",
    ),
    Mutant(
        "blocks above the depth are not read",
        "emotion_train/bases/depth.py",
        "is_read",
        "int(block[1]) < layers",
        "int(block[1]) <= layers",
        "tests/emotion_train/model/test_depth.py::test_files_of_blocks_above_need_not_be_there",
    ),
    Mutant(
        "an adapter of one depth is refused at another",
        "emotion_train/runs/parent.py",
        "refuse_other_depth",
        "own != layers",
        "False",
        "tests/emotion_train/training/test_train_on.py"
        "::test_what_does_not_fit_is_refused_before_anything_is_loaded",
    ),
    Mutant(
        "a base is looked at before the run is claimed",
        "emotion_train/model/trainable.py",
        "require_trainable_base",
        "_refuse_ids_beyond(files.name, tokenizer, model.vocab_size)",
        "pass",
        "tests/emotion_train/model/test_trainable.py"
        "::test_the_trainer_refuses_before_it_claims_and_stage_base_before_it_writes",
    ),
    Mutant(
        "a hub that is away is asked once in a verb",
        "emotion_train/edges/hub.py",
        "ask",
        "time.monotonic() - asked_at < REMEMBERED_S",
        "False",
        "tests/emotion_train/edges/test_hub.py"
        "::test_a_silent_hub_is_waited_for_once_in_a_verb_and_asked_again_later",
    ),
    Mutant(
        "a terminal gets no command out of a post",
        "emotion_train/evaluation/answer_lines.py",
        "Written.as_text",
        "shown(post.text)",
        "post.text",
        "tests/emotion_train/test_output_is_data.py::test_commands_for_a_terminal_are_shown",
    ),
    Mutant(
        "an archive of kernels is measured before it is unpacked",
        "emotion_train/model/built_kernels.py",
        "unpack",
        "require_size(sum((member.file_size for member in file.infolist())), MAX_BYTES)",
        "pass",
        "tests/emotion_train/model/test_built_kernels.py::test_an_archive_of_too_many_bytes_is_not_unpacked",
    ),
    # a store that does not answer at the start
    Mutant(
        "an outage is no wrong request",
        "emotion_train/errors.py",
        "StorageError.__init__",
        "if transient:",
        "if False:",
        "tests/emotion_train/test_errors.py::test_a_refusal_ends_a_program_with_2_and_an_outage_with_1",
    ),
    Mutant(
        "what a person has to mend is not waited for",
        "emotion_train/storage/patience.py",
        "until_it_answers",
        "not error.transient or patience.left_s <= 0",
        "patience.left_s <= 0",
        "tests/emotion_train/storage/test_patience.py::test_what_waiting_does_not_mend_is_raised_at_once",
    ),
    Mutant(
        "a start that waited in vain is no wrong request",
        "emotion_train/storage/patience.py",
        "StoreRequest.result",
        "isinstance(self._error, StorageError) and self._error.transient",
        "False",
        "tests/emotion_train/storage/test_patience.py::test_a_request_whose_time_is_over_names_store_time_and_cause",
    ),
    Mutant(
        "a claim that is tried again is the same entry",
        "emotion_train/runs/log.py",
        "Writer.claim",
        "if self._tried is None or (self._tried.seq, self._tried.epoch, self._tried.step) != place:",
        "if True:",
        "tests/emotion_train/runs/test_log.py::test_a_claim_whose_answer_was_lost_is_made_once",
    ),
    Mutant(
        "33 is for a run that is saved",
        "emotion_train/training/waiting.py",
        "PatientStart._leave",
        "Preempted if saved else NotStarted",
        "Preempted",
        "tests/emotion_train/training/test_waiting.py::test_33_is_only_for_a_run_whose_newest_state_is_known_to_be_saved",
    ),
    # what is called better
    Mutant(
        "a floor that is not beaten for certain takes the check mark",
        "emotion_train/report/figures.py",
        "decisive",
        "floor.outcome != 'beaten'",
        "False",
        "tests/emotion_train/report/test_report.py::test_a_weaker_floor_that_is_not_beaten_for_certain_takes_the_check_mark",
    ),
    Mutant(
        "posts that chose the thresholds are answered by those of other posts",
        "emotion_train/report/figures.py",
        "decided",
        "decision.held_out(predictions) if chose",
        "decision.held_out(predictions) if False",
        "tests/emotion_train/report/test_several.py::test_the_headline_of_validation_is_out_of_fold_and_that_of_test_by_the_decision",
    ),
    Mutant(
        "a report is of what the ranks counted",
        "emotion_train/report/agreement.py",
        "_require_own_counts",
        "np.array_equal(counted, result.counts)",
        "True",
        "tests/emotion_train/report/test_several.py::test_counts_that_differ_from_the_predictions_stop_the_report",
    ),
    Mutant(
        "a handful of posts tells nothing",
        "emotion_train/evaluation/metrics.py",
        "paired_bootstrap_macro_f1",
        "if rows_K[~alike_N(a_KC, b_KC)].sum() < FEWEST_DIFFERENT:",
        "if False:",
        "tests/emotion_train/evaluation/test_comparison.py::test_a_handful_of_posts_tells_nothing",
    ),
    Mutant(
        "a post is answered by thresholds that other posts chose",
        "emotion_train/evaluation/thresholds.py",
        "cross_fit",
        "whole.without(own)",
        "whole",
        "tests/emotion_train/evaluation/test_thresholds.py"
        "::test_a_post_is_answered_by_thresholds_that_it_did_not_choose",
    ),
    Mutant(
        "few posts of a label do not choose its threshold alone",
        "emotion_train/evaluation/thresholds.py",
        "_best_C",
        "weight_C * (own_C - common)",
        "(own_C - common)",
        "tests/emotion_train/evaluation/test_thresholds.py"
        "::test_few_posts_of_a_label_are_pulled_to_the_threshold_of_all",
    ),
    Mutant(
        "an interval counts the seeds",
        "emotion_train/evaluation/comparison.py",
        "paired_difference",
        "if spread.run is not None:",
        "if False:",
        "tests/emotion_train/evaluation/test_comparison.py::test_intervals_hold_a_planted_difference_nineteen_times_out_of_twenty[runs2-0.2]",
    ),
    Mutant(
        "posts of other texts are not compared",
        "launch/results/same_posts.py",
        "_same_texts",
        "if here.objects(first.split) != there.objects(other.split):",
        "if False:",
        "tests/launch/results/test_compare.py::test_another_training_split_is_told_and_other_test_posts_are_refused",
    ),
    Mutant(
        "several comparisons are corrected for",
        "emotion_train/evaluation/comparison.py",
        "holm",
        "(len(given) - rank) * given[place]",
        "given[place]",
        "tests/launch/results/test_compare.py::test_several_comparisons_are_corrected_and_that_is_said",
    ),
    Mutant(
        "posts of other targets are not compared",
        "launch/results/same_posts.py",
        "_refuse_other_targets",
        "if here != there:",
        "if False:",
        "tests/launch/results/test_compare_targets.py::test_what_is_no_comparison_is_refused",
    ),
    # several labels a post
    Mutant(
        "columns of labels in a file are those of the adapter's labels in any order",
        "emotion_train/judging/file_posts.py",
        "_targets",
        "labels.index(name) for name in in_file",
        "*range(len(in_file))",
        "tests/emotion_train/judging/test_evaluate_targets.py::test_a_file_is_read_in_every_form[several-columns]",
    ),
    Mutant(
        "an adapter that answers in a way of a later version is refused",
        "emotion_train/model/facts.py",
        "_refuse_later",
        "elif targets not in KINDS:",
        "elif False:",
        "tests/emotion_train/model/test_lora.py::test_an_adapter_of_a_later_version_is_refused_by_name",
    ),
    Mutant(
        "of several labels those are given that reach their threshold",
        "emotion_train/evaluation/decision.py",
        "Decision.ranked",
        "if given_C[label]",
        "if True",
        "tests/emotion_train/evaluation/test_answers.py"
        "::test_several_labels_are_those_that_reach_their_threshold",
    ),
    Mutant(
        "the published head is divided by its temperature",
        "emotion_train/training/finish.py",
        "_score_splits",
        "adapter = with_temperature(adapter, _of_all_rows(temperature, job.index))",
        "adapter = dict(adapter)",
        "tests/emotion_train/training/test_finish.py"
        "::test_a_run_on_several_labels_publishes_its_decision_and_the_answers_that_its_report_counts",
    ),
    Mutant(
        "thresholds and figures are those of the divided head",
        "emotion_train/training/finish.py",
        "_score_splits",
        "temperature is None and name == names[0]",
        "name == names[0]",
        "tests/emotion_train/training/test_finish.py"
        "::test_a_run_on_several_labels_publishes_its_decision_and_the_answers_that_its_report_counts",
    ),
    Mutant(
        "a post is judged at a temperature that it did not choose",
        "emotion_train/evaluation/temperature.py",
        "temper",
        "fold_N[:, None] != np.arange(folds)",
        "fold_N[:, None] >= 0 * np.arange(folds)",
        "tests/emotion_train/evaluation/test_temperature.py"
        "::test_posts_are_judged_by_the_temperature_of_the_other_folds",
    ),
    Mutant(
        "a temperature is kept where it gains beyond its interval",
        "emotion_train/evaluation/temperature.py",
        "temper",
        "np.percentile(means_SK, 2.5, axis=0) > 0",
        "np.percentile(means_SK, 2.5, axis=0) > -1",
        "tests/emotion_train/evaluation/test_temperature.py::test_chances_need_no_temperature",
    ),
    Mutant(
        "a gate's walk ends at the first stop that fails",
        "emotion_train/evaluation/gate.py",
        "lowest_threshold",
        "passed = int(failed_J.argmax()) if failed_J.any() else len(failed_J)",
        "passed = len(failed_J) - int(failed_J[::-1].argmin()) if not failed_J.all() else 0",
        "tests/emotion_train/evaluation/test_gate.py::test_the_walk_ends_at_the_first_stop_that_fails",
    ),
    Mutant(
        "a gate asks the lower bound and not the share itself",
        "emotion_train/evaluation/gate.py",
        "lower_bound",
        "np.where(right > 0, bound, 0.0)",
        "right / of",
        "tests/emotion_train/evaluation/test_gate.py"
        "::test_answers_that_are_never_right_often_enough_are_seldom_accepted",
    ),
    Mutant(
        "an answer without a label is never accepted",
        "emotion_train/evaluation/decision.py",
        "Decision.accepted",
        "(found_N >= threshold) & (found_N > 0)",
        "found_N >= threshold",
        "tests/emotion_train/evaluation/test_decision.py"
        "::test_of_several_labels_the_least_likely_one_has_to_reach_the_gate_and_none_is_not_accepted",
    ),
    Mutant(
        "after a failure no further seed is started",
        "launch/run/seeds.py",
        "spread",
        "while waiting and idle and (not any(codes)) and (not signals):",
        "while waiting and idle:",
        "tests/launch/run/test_seeds.py::test_after_a_failure_none_is_started_and_its_code_is_told",
    ),
]


def find(tree: ast.Module, place: str) -> tuple[list[ast.stmt], int]:
    """The list of statements that holds the definition named `place`, and its position there.
    Raises `KeyError`.
    """
    body = tree.body
    *outer, last = place.split(".")
    for name in outer:
        body = next(
            one.body for one in body if isinstance(one, ast.ClassDef | ast.FunctionDef) and one.name == name
        )
    for number, one in enumerate(body):
        if isinstance(one, ast.FunctionDef) and one.name == last:
            return body, number
        targets = (
            one.targets
            if isinstance(one, ast.Assign)
            else [one.target]
            if isinstance(one, ast.AnnAssign)
            else []
        )
        if last in [target.id for target in targets if isinstance(target, ast.Name)]:
            return body, number
    raise KeyError(place)


def break_rule(source: str, mutant: Mutant) -> str:
    """The page's source with the rule broken. Raises `KeyError` or `ValueError` where place or
    words are gone, or not unique.
    """
    tree = ast.parse(source)
    body, number = find(tree, mutant.place)
    whole = ast.unparse(body[number])
    if whole.count(mutant.words) != 1:
        raise ValueError(
            f"{mutant.words!r} occurs {whole.count(mutant.words)} times in {mutant.place} of {mutant.page}"
        )
    body[number : number + 1] = ast.parse(whole.replace(mutant.words, mutant.broken)).body
    return ast.unparse(tree)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mutants")
    for name in COPIED:
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "test_mutants.py")
        )
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run_tests(copy: Path, names: list[str]) -> subprocess.CompletedProcess[str]:
    """These tests in a process of their own, with the copy's modules; some see a broken rule by
    waiting in vain, so they wait less long.
    """
    command = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "", *names]
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PATIENCE_S": "60"}
    return subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, text=True, check=False, timeout=LONGEST_S
    )


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.rule.replace(" ", "-").replace(",", ""))
def test_every_rule_stands_once_where_it_will_be_broken(mutant: Mutant) -> None:
    """At once, and not only when somebody runs the slow tests; so does the test that is there for
    the rule.
    """
    source = (ROOT / mutant.page).read_text(encoding="utf-8")
    assert break_rule(source, mutant) != ast.unparse(ast.parse(source))
    file, _, test = mutant.caught_by.partition("::")
    assert f"def {test.partition('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_whole_copy_passes(copy: Path) -> None:
    done = run_tests(copy, sorted({mutant.caught_by for mutant in MUTANTS}))
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.rule.replace(" ", "-").replace(",", ""))
def test_a_broken_rule_is_caught(copy: Path, mutant: Mutant) -> None:
    page = copy / mutant.page
    whole = page.read_text(encoding="utf-8")
    page.write_text(break_rule(whole, mutant), encoding="utf-8")
    try:
        done = run_tests(copy, [mutant.caught_by])
    finally:
        page.write_text(whole, encoding="utf-8")
    assert done.returncode == 1, (
        f"{mutant.rule}: not caught by {mutant.caught_by}\n{done.stdout}{done.stderr}"
    )
    assert " failed" in done.stdout, done.stdout
