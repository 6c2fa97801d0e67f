"""
What `make test-fast` leaves out: what starts servers or other processes, installs, trains more than a moment, or tries
many cases. A test that has one of the vLLM servers is left out, too, wherever it is.
"""

FILES = {
    "test_micro_batches", "test_benchmark_scripts", "test_colocated", "test_demo", "test_distributed", "test_docs",
    "test_drop_in", "test_equal_to_stock", "test_memory", "test_one_update", "test_report_command",
    "test_transformers_engine_models",
    "test_eval_command",
    "test_evaluate", "test_faults", "test_lapo", "test_length_rewards", "test_notebooks", "test_package",
    "test_peft", "test_real_input", "test_recipes", "test_sas", "test_served_images",
    "test_vllm_process", "test_step_grpo", "test_study",
    "test_terminal", "test_testbed_rollouts", "test_trace", "test_trackers", "test_train", "test_two_ranks",
    "test_serve", "test_vllm", "test_vllm_faults", "test_vllm_server_engine",
}  # fmt: skip
TESTS = {
    "test_a_group_is_exits_from_one_thought", "test_a_killed_run_goes_on",
    "test_a_model_learns_from_its_short_completions", "test_a_run_of_wandb", "test_batches_equal_the_reference",
    "test_evaluations_and_trainings_side_by_side", "test_every_answer_is_right_for_its_own_problem_only",
    "test_hostile_input_ends_in_time_and_the_next_call_works",
    "test_script_without_main_guard", "test_segmenters_equal_the_reference",
    "test_the_folder_loads_in_a_new_process_without_the_package",
    "test_threads_share_the_pool", "test_worker_ends_with_its_parent",
}  # fmt: skip
