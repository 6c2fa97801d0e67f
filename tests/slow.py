"""
What `make test-fast` leaves out: what starts servers or other processes, installs, trains more than a moment, or tries
many cases. A test that has one of the vLLM servers is left out, too, wherever it is.
"""

FILES = {
    "test_micro_batches", "test_benchmark_scripts", "test_colocated", "test_critique_grpo", "test_demo",
    "test_distributed", "test_dler", "test_docs", "test_drop_in", "test_equal_to_stock", "test_gpu_blocks", "test_gvm",
    "test_lead",
    "test_memory", "test_nft", "test_one_update", "test_own_rollouts", "test_report_command", "test_seed_grpo",
    "test_spae", "test_spo", "test_transformers_engine_models",
    "test_eval_command",
    "test_evaluate", "test_faults", "test_lapo", "test_length_rewards", "test_notebooks", "test_package",
    "test_peft", "test_real_input", "test_recipes", "test_sas", "test_served_images",
    "test_vllm_process", "test_step_grpo", "test_study",
    "test_terminal", "test_testbed_rollouts", "test_trace", "test_trackers", "test_train", "test_two_ranks",
    "test_serve", "test_vllm", "test_vllm_faults", "test_vllm_server_engine",
}  # fmt: skip
TESTS = {
    "test_a_branch_that_ends_is_a_leaf_and_the_last_level_goes_to_the_end", "test_a_dry_run_of_a_recipe",
    "test_a_group_is_exits_from_one_thought", "test_a_killed_run_goes_on",
    "test_a_model_learns_from_its_short_completions", "test_a_run_of_wandb",
    "test_answers_in_blocks_are_graded_as_such",
    "test_batches_equal_the_reference", "test_calls_in_pieces_equal_one_call_under_every_memory_bound",
    "test_certain_tokens_leave_the_loss_and_its_normaliser", "test_completions_of_the_testbed_model",
    "test_equal_texts_are_read_once_and_a_hostile_one_has_no_answer", "test_equal_the_references",
    "test_evaluations_and_trainings_side_by_side", "test_every_answer_is_right_for_its_own_problem_only",
    "test_fine_tuning_on_examples", "test_hostile_input_costs_its_neighbours_nothing",
    "test_hostile_input_ends_in_time_and_the_next_call_works", "test_model_answers_in_format",
    "test_one_process_plans_for_many", "test_pretraining_runs_from_end_to_end",
    "test_script_without_main_guard", "test_segmenters_equal_the_reference", "test_selection_equals_the_reference",
    "test_the_folder_loads_in_a_new_process_without_the_package",
    "test_the_next_batch_is_known_and_the_order_stays", "test_the_picture_of_trainings_has_no_empty_place",
    "test_threads_share_the_pool", "test_tokens_that_are_read_early_are_those_of_the_rollout",
    "test_what_a_dry_run_finds", "test_worker_ends_with_its_parent", "test_worker_killed_between_calls_is_replaced",
}  # fmt: skip
