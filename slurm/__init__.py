"""Recipes on a SLURM cluster: `bigtrain-slurm submit | sweep | status | logs | cancel | retry`. They are not imported.

cluster (a cluster file), sweep (a sweep file: runs)      what is asked for
ask_recipe, prepare_run, submit                           from a run to a job
scheduler                                                 all communication with SLURM (job_parameters, refusals)
attempt, attempt_end, process                             inside a job: what each process does
run_record                                                a run's folder: JobSpec, RunLock, events
status, local                                             looking at runs; running them on this machine
"""
