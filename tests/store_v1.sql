-- A run store as version 1 wrote it, in all its states. Never changed: later versions are to read it.
CREATE TABLE runs (
    id        INTEGER PRIMARY KEY AUTOINCREMENT,
    status    TEXT    NOT NULL DEFAULT 'queued' CHECK (status IN
              ('queued', 'running', 'done', 'stopped', 'diverged', 'failed', 'interrupted')),
    request   TEXT    NOT NULL,
    created   REAL    NOT NULL,
    queued    REAL,
    started   REAL,
    ended     REAL,
    attempts  INTEGER NOT NULL DEFAULT 0,
    step      INTEGER NOT NULL DEFAULT 0,
    steps     INTEGER NOT NULL DEFAULT 0,
    base_loss REAL,
    loss      REAL,
    score     TEXT,
    result    TEXT,
    error     TEXT,
    adapter   INTEGER NOT NULL DEFAULT 0,
    pid       INTEGER,
    process   TEXT
) STRICT;
CREATE INDEX runs_live ON runs (status, queued) WHERE status IN ('queued', 'running');
INSERT INTO runs VALUES (1, 'done', '{"model": "smollm2-135m", "task": "restaurant", "data": null, "test": null, "spec": {"targets": ["q", "v"], "rank": 8, "alpha": 16.0, "layers": "all"}, "config": {"steps": 60, "seed": 0, "lr": 0.001}, "template": null, "title": "the first", "objective": null}', 1790000000.25, NULL, 1790000001.5, 1790000099.75, 1, 60, 60, 2.75, 1.5, '{"name": "BLEU", "base": {"BLEU": 3.5}, "adapted": {"BLEU": 41.0}, "rows": 16}', '{"train_s": 81.5, "tokens": 30000, "dtype": "float32", "device": "cpu", "trainable": 460800}', NULL, 1, 4242, 'boot:77');
INSERT INTO runs VALUES (2, 'stopped', '{"model": "smollm2-135m", "task": null, "data": "/home/mina/my rows.TSV", "test": null, "spec": {"targets": ["q"], "rank": 4, "alpha": 8.0, "layers": [0, 1]}, "config": {"steps": 500}, "template": "{prompt} =", "title": null, "objective": "lm"}', 1790000100.0, NULL, 1790000101.0, 1790000150.0, 3, 120, 500, 3.25, 2.0, NULL, '{}', NULL, 1, 4243, 'boot:78');
INSERT INTO runs VALUES (3, 'diverged', '{"model": "smollm2-135m", "task": "pirate", "data": null, "test": null, "spec": {"targets": ["q"], "rank": 4}, "config": {"steps": 50, "lr": 100.0}, "template": null, "title": "too fast \ud800 </script>", "objective": null}', 1790000200.0, NULL, 1790000201.0, 1790000210.0, 1, 4, 50, 3.25, NULL, NULL, '{"train_s": 3.0}', 'the loss stopped being a finite number at step 5', 1, 4244, 'boot:79');
INSERT INTO runs VALUES (4, 'failed', '{"model": "no such model", "task": "pirate", "data": null, "test": null, "spec": {}, "config": {"steps": 50}, "template": null, "title": null}', 1790000300.0, NULL, 1790000301.0, 1790000302.0, 1, 0, 50, NULL, NULL, NULL, '{"wall_s": 0.5}', 'no model ''no such model''', 0, 4245, 'boot:80');
INSERT INTO runs VALUES (5, 'interrupted', '{"model": "smollm2-135m", "task": "pirate", "data": null, "test": null, "spec": {"targets": ["q"]}, "config": {"steps": 50}, "template": null, "title": null, "objective": null}', 1790000400.0, NULL, 1790000401.0, 1790000402.0, 2, 20, 50, 3.25, 2.5, NULL, NULL, 'its process was killed (signal 9)', 0, 4246, 'boot:81');
INSERT INTO runs VALUES (7, 'running', '{"model": "smollm2-135m", "task": "pirate", "data": null, "test": null, "spec": {"targets": ["q"]}, "config": {"steps": 50}, "template": null, "title": null, "objective": null}', 1790000500.0, NULL, 1790000501.0, NULL, 1, 10, 50, 3.25, 3.0, NULL, NULL, NULL, 0, 4247, 'boot:82');
INSERT INTO runs VALUES (8, 'queued', '{"model": "smollm2-135m", "task": "pirate", "data": null, "test": null, "spec": {"targets": ["q"]}, "config": {"steps": 50}, "template": null, "title": null, "objective": null}', 1790000600.0, 1790000600.5, NULL, NULL, 0, 0, 50, NULL, NULL, NULL, NULL, NULL, 0, NULL, NULL);
INSERT INTO runs VALUES (9, 'queued', '{"model": "smollm2-135m", "task": "pirate", "data": null, "test": null, "spec": {"targets": ["q"]}, "config": {"steps": 50}, "template": null, "title": null, "objective": null}', 1790000610.0, 1790000610.5, NULL, NULL, 0, 0, 50, NULL, NULL, NULL, NULL, NULL, 0, NULL, NULL);
UPDATE sqlite_sequence SET seq = 12 WHERE name = 'runs';
PRAGMA application_id = 1282363969;
PRAGMA user_version = 1;
