-- Shadows: what each device should be, and what it says it is; and what is to be said to devices.

-- A device's unnamed shadow (its name is empty) is the lock of all its shadows, and there from the first word about any
-- of them: version 0 is a row that is that and nothing more. A deleted shadow stays, without state, for its version.
-- The marks say which message, by its position, has the last word on each attribute (domain/shadow_merge.py). position is
-- that of the last message of the device that was taken in, deleted where the shadow was deleted last; a message below
-- forgotten can no longer be put in its place. json, not jsonb, which would give 1e30 back as an integer of 31 digits.
CREATE TABLE shadows (
    tenant_id      text    NOT NULL,
    device_id      text    NOT NULL,
    name           text    NOT NULL DEFAULT '',
    version        bigint  NOT NULL DEFAULT 0,
    present        boolean NOT NULL DEFAULT false,
    desired        json    NOT NULL DEFAULT '{}',
    desired_mark   json    NOT NULL DEFAULT '[]',
    reported       json    NOT NULL DEFAULT '{}',
    reported_mark  json    NOT NULL DEFAULT '[]',
    updated_ms     bigint  NOT NULL DEFAULT 0,
    position       bigint  NOT NULL DEFAULT 0,
    deleted        bigint  NOT NULL DEFAULT -1,
    forgotten      bigint  NOT NULL DEFAULT -1,
    PRIMARY KEY (tenant_id, device_id, name)
) WITH (fillfactor = 70);

-- The last changes of each shadow, as many as there are slots (version modulo their number), so that it never grows.
-- who: `device`, or whose key it was; patch: the sections that were asked for, null for a deletion.
CREATE TABLE shadow_changes (
    tenant_id  text   NOT NULL,
    device_id  text   NOT NULL,
    name       text   NOT NULL,
    slot       int    NOT NULL,
    version    bigint NOT NULL,
    changed_ms bigint NOT NULL,
    who        text   NOT NULL,
    patch      json,
    PRIMARY KEY (tenant_id, device_id, name, slot),
    FOREIGN KEY (tenant_id, device_id, name) REFERENCES shadows ON DELETE CASCADE
) WITH (fillfactor = 70);

-- Written in the transaction of what it tells of, deleted once JetStream has it: a crash in between says it once more.
-- kind: which role posts it. It is filled and emptied all day, so what counts for autovacuum is how often, not its size.
CREATE TABLE outbox (
    id         bigint      GENERATED ALWAYS AS IDENTITY,
    kind       text        NOT NULL CHECK (kind IN ('shadow', 'commands')),
    tenant_id  text        NOT NULL,
    device_id  text        NOT NULL,
    topic      text        NOT NULL,
    body       bytea       NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (kind, id)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000);

GRANT SELECT, INSERT, UPDATE, DELETE ON shadows TO pulse_tenant;
GRANT SELECT, INSERT, UPDATE ON shadow_changes TO pulse_tenant;
GRANT INSERT ON outbox TO pulse_tenant;

ALTER TABLE shadows ENABLE ROW LEVEL SECURITY;
ALTER TABLE shadow_changes ENABLE ROW LEVEL SECURITY;
ALTER TABLE outbox ENABLE ROW LEVEL SECURITY;

CREATE POLICY own_tenant ON shadows TO pulse_tenant USING (tenant_id = current_setting('pulse.tenant', true));
CREATE POLICY own_tenant ON shadow_changes TO pulse_tenant USING (tenant_id = current_setting('pulse.tenant', true));
CREATE POLICY own_tenant ON outbox TO pulse_tenant USING (tenant_id = current_setting('pulse.tenant', true));
