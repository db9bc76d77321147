-- The latest value of each metric of a device, {name: [value, µs since the epoch, position]}.
-- latest_from and latest_to: no value of them is from before or after; null where there are none.
ALTER TABLE device_state
    ADD COLUMN latest      jsonb NOT NULL DEFAULT '{}',
    ADD COLUMN latest_from timestamptz,
    ADD COLUMN latest_to   timestamptz;

-- Never compressed: pg_column_size then bounds the number of names, of which each takes 49 bytes or more.
ALTER TABLE device_state ALTER COLUMN latest SET STORAGE EXTERNAL;

-- Of each name the value that comes last by (time, position); of more than 1024 names those that were said last.
-- The same join as pulse.domain.device_state: any order of words, and any repetition, ends in the same.
CREATE FUNCTION merged_latest(known jsonb, said jsonb) RETURNS jsonb LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT coalesce(jsonb_object_agg(name, value), '{}')
    FROM (
        SELECT name, value
        FROM (
            SELECT DISTINCT ON (name) name, value
            FROM (SELECT * FROM jsonb_each(known) UNION ALL SELECT * FROM jsonb_each(said)) AS both_of (name, value)
            ORDER BY name, (value->1)::bigint DESC, (value->2)::bigint DESC
        ) AS latest
        ORDER BY (value->1)::bigint DESC, (value->2)::bigint DESC, name COLLATE "C" DESC
        LIMIT 1024
    ) AS kept
$$;
