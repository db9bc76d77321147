-- Commands: what devices are told to do, and how far each has come.

-- number: the order in which they were made. due_ms: when time moves it, null where it is final. said_ms, says: when it
-- was last put into the outbox, how often; sent_ms, sends: when it last left for its device, how often. held: it waits
-- for an older ordered one of its device and name, and was not said yet. All times are in ms since the epoch. payload and
-- result are json and not jsonb: a device is told what was asked, and nobody searches them.
CREATE TABLE commands (
    tenant_id       text    NOT NULL,
    command_id      text    NOT NULL,
    number          bigint  GENERATED ALWAYS AS IDENTITY,
    device_id       text    NOT NULL,
    name            text    NOT NULL,
    payload         json    NOT NULL,
    state           text    NOT NULL DEFAULT 'queued' CHECK (state IN (
        'queued', 'sent', 'acknowledged', 'succeeded', 'failed', 'rejected', 'expired', 'timed_out', 'cancelled'
    )),
    ordered         boolean NOT NULL DEFAULT false,
    held            boolean NOT NULL DEFAULT false CHECK (ordered OR NOT held),
    created_ms      bigint  NOT NULL,
    expires_ms      bigint  NOT NULL,
    timeout_ms      bigint  NOT NULL,
    due_ms          bigint  CHECK ((due_ms IS NULL) = (state NOT IN ('queued', 'sent', 'acknowledged'))),
    said_ms         bigint  NOT NULL DEFAULT 0,
    says            int     NOT NULL DEFAULT 0,
    sent_ms         bigint,
    sends           int     NOT NULL DEFAULT 0,
    ended_ms        bigint,
    result          json,
    error           text,
    created_by      text    NOT NULL,
    idempotency_key text,
    fleet_id        text,
    PRIMARY KEY (tenant_id, command_id)
) WITH (fillfactor = 85);

CREATE UNIQUE INDEX commands_idempotency ON commands (tenant_id, idempotency_key) WHERE idempotency_key IS NOT NULL;
-- What makes two ordered ones of a device and name at the same time impossible.
CREATE UNIQUE INDEX commands_in_order ON commands (tenant_id, device_id, name)
    WHERE ordered AND NOT held AND due_ms IS NOT NULL;
CREATE INDEX commands_open ON commands (tenant_id, device_id, number) WHERE due_ms IS NOT NULL;
CREATE INDEX commands_due ON commands (due_ms) WHERE due_ms IS NOT NULL;
CREATE INDEX commands_newest ON commands (tenant_id, created_ms DESC, command_id DESC);
CREATE INDEX commands_in_state ON commands (tenant_id, state, created_ms DESC, command_id DESC);
CREATE INDEX commands_of_device ON commands (tenant_id, device_id, created_ms DESC, command_id DESC);
CREATE INDEX commands_of_fleet ON commands (tenant_id, fleet_id, created_ms DESC, command_id DESC)
    WHERE fleet_id IS NOT NULL;
CREATE INDEX commands_progress ON commands (tenant_id, fleet_id, state) WHERE fleet_id IS NOT NULL;
CREATE INDEX commands_ended ON commands (ended_ms) WHERE ended_ms IS NOT NULL;

-- Which state a command came into, when and by whom: `device`, `pulse`, or the name of an API key. It comes into each
-- state once at most, so that a command cannot make this grow.
CREATE TABLE command_moves (
    tenant_id  text   NOT NULL,
    command_id text   NOT NULL,
    state      text   NOT NULL,
    at_ms      bigint NOT NULL,
    who        text   NOT NULL,
    PRIMARY KEY (tenant_id, command_id, state)
);

-- One request to many devices. last_device: up to which, in the order of ids, the devices have been looked at;
-- turn_ms: when it last had its turn, for fleets take turns.
CREATE TABLE fleet_commands (
    tenant_id       text   NOT NULL,
    fleet_id        text   NOT NULL,
    name            text   NOT NULL,
    payload         json   NOT NULL,
    filter          jsonb  NOT NULL,
    stage           text   NOT NULL DEFAULT 'expanding' CHECK (stage IN (
        'expanding', 'expanded', 'cancelling', 'cancelled'
    )),
    last_device     text   NOT NULL DEFAULT '',
    devices         bigint NOT NULL DEFAULT 0,
    created_ms      bigint NOT NULL,
    expires_ms      bigint NOT NULL,
    timeout_ms      bigint NOT NULL,
    created_by      text   NOT NULL,
    cancelled_by    text,
    turn_ms         bigint NOT NULL DEFAULT 0,
    idempotency_key text,
    PRIMARY KEY (tenant_id, fleet_id)
);

CREATE UNIQUE INDEX fleet_commands_idempotency ON fleet_commands (tenant_id, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
CREATE INDEX fleet_commands_newest ON fleet_commands (tenant_id, created_ms DESC, fleet_id DESC);
CREATE INDEX fleet_commands_unfinished ON fleet_commands (turn_ms) WHERE stage IN ('expanding', 'cancelling');

-- Nothing is deleted by a tenant: finished commands go by their age.
GRANT SELECT, INSERT, UPDATE ON commands, fleet_commands TO pulse_tenant;
GRANT SELECT, INSERT ON command_moves TO pulse_tenant;

ALTER TABLE commands ENABLE ROW LEVEL SECURITY;
ALTER TABLE command_moves ENABLE ROW LEVEL SECURITY;
ALTER TABLE fleet_commands ENABLE ROW LEVEL SECURITY;

CREATE POLICY own_tenant ON commands TO pulse_tenant USING (tenant_id = current_setting('pulse.tenant', true));
CREATE POLICY own_tenant ON command_moves TO pulse_tenant USING (tenant_id = current_setting('pulse.tenant', true));
CREATE POLICY own_tenant ON fleet_commands TO pulse_tenant USING (tenant_id = current_setting('pulse.tenant', true));
