-- What became of a dead letter: how often it was replayed, and as which message; and which one a dead letter came of.

-- replayed_sequence: of the last replay, in the stream that the letter came from.
-- replay_of is read from the header that a replay gives its message, so that no writer has to know of it. `escape` leaves
-- ASCII as it is and, unlike a conversion from UTF-8, refuses no byte.
ALTER TABLE dead_letters
    ADD COLUMN replays           int    NOT NULL DEFAULT 0,
    ADD COLUMN replayed_at       timestamptz,
    ADD COLUMN replayed_sequence bigint,
    ADD COLUMN replay_of         bigint GENERATED ALWAYS AS (
        substring(encode(headers, 'escape') FROM '\nPulse-Replay-Of: ([0-9]{1,18})\r')::bigint
    ) STORED;

CREATE INDEX dead_letters_tenant ON dead_letters (tenant_id, id DESC);
CREATE INDEX dead_letters_reason ON dead_letters (reason, replays);
CREATE INDEX dead_letters_replay_of ON dead_letters (replay_of) WHERE replay_of IS NOT NULL;

-- A tenant may replay and purge what is its own; the policy of 0003 keeps it to that.
GRANT UPDATE (replays, replayed_at, replayed_sequence), DELETE ON dead_letters TO pulse_tenant;
