-- What more is known of a dead letter: whether it ever stood in its stream, and which route wanted it.

-- A letter that a role refused before its stream had it has the position of its carrier in DEAD_LETTERS: in_stream is false.
-- route_id: of a job, from the members that domain/route.make_job puts behind the envelope; what a device says stands
-- before them. `escape` leaves ASCII as it is and refuses no byte.
ALTER TABLE dead_letters
    ADD COLUMN in_stream boolean NOT NULL DEFAULT true,
    ADD COLUMN route_id  text    GENERATED ALWAYS AS (
        CASE WHEN stream = 'ROUTES' THEN substring(
            encode(body, 'escape')
            FROM '"route_id"\s*:\s*"([A-Za-z0-9_-]{1,64})"\s*,\s*"position"\s*:\s*[0-9]{1,19}(?:\s*,\s*"hops"\s*:\s*[0-9]{1,9})?\s*\}\s*$'
        ) END
    ) STORED;

UPDATE dead_letters SET in_stream = false
FROM stream_epochs
WHERE stream_epochs.epoch = dead_letters.position >> 46 AND stream_epochs.stream <> dead_letters.stream;

CREATE INDEX dead_letters_route ON dead_letters (route_id, id DESC) WHERE route_id IS NOT NULL;
