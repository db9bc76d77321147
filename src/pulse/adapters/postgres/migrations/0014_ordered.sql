-- Jobs of ordered routes: of one device of a route, and one making of a stream, one line, sent from its head.

-- jobs: how many stand in the line; a line without any is removed. due_at: when a worker may next take it; one that has it
-- moves that on while it works. claim grows with each taking, so that who lost the line moves nothing of it.
CREATE TABLE ordered_lines (
    tenant_id text        NOT NULL,
    route_id  text        NOT NULL,
    device_id text        NOT NULL,
    epoch     int         NOT NULL,
    jobs      int         NOT NULL CHECK (jobs >= 0),
    due_at    timestamptz NOT NULL DEFAULT now(),
    claim     bigint      NOT NULL DEFAULT 0,
    PRIMARY KEY (tenant_id, route_id, device_id, epoch)
) WITH (fillfactor = 50);
CREATE INDEX ordered_lines_due ON ordered_lines (due_at);

-- body: the job as it stands in ROUTES otherwise (domain/route.py); since_ms: when it first came, in ms since the epoch.
-- No reference to routes: what stands here for a route that was removed becomes dead letters.
CREATE TABLE ordered_jobs (
    tenant_id text   NOT NULL,
    route_id  text   NOT NULL,
    device_id text   NOT NULL,
    position  bigint NOT NULL,
    body      bytea  NOT NULL,
    attempts  int    NOT NULL DEFAULT 0,
    since_ms  bigint NOT NULL,
    PRIMARY KEY (tenant_id, route_id, device_id, position)
);

GRANT SELECT ON ordered_lines TO pulse_tenant;
ALTER TABLE ordered_lines ENABLE ROW LEVEL SECURITY;
ALTER TABLE ordered_jobs ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_tenant ON ordered_lines TO pulse_tenant USING (tenant_id = current_setting('pulse.tenant', true));
