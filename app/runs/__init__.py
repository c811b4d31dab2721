"""Training runs: a store that keeps them, a worker process that trains one, a queue that starts workers.

    store = RunStore()                        # app.runs.store: SQLite and one folder a run
    run = store.create(RunRequest(...))       # app.runs.run
    RunQueue(store).start(run.id)             # app.runs.queue: in the server; `run_here` of app.runs.worker without one
    store.events(run.id)                      # what happened so far

Nothing here imports torch before a run is trained.
"""
