-- How often a tenant may send, all its devices together and each of them, where that is not what the settings say.

ALTER TABLE tenants
    ADD COLUMN messages_per_s        double precision,
    ADD COLUMN messages_burst        int,
    ADD COLUMN device_messages_per_s double precision,
    ADD COLUMN device_messages_burst int,
    ADD CONSTRAINT tenants_messages CHECK (
        (messages_per_s IS NULL) = (messages_burst IS NULL)
        AND (messages_per_s = 0 OR messages_per_s BETWEEN 0.001 AND 1000000)
        AND messages_burst BETWEEN 1 AND 1000000000
    ),
    ADD CONSTRAINT tenants_device_messages CHECK (
        (device_messages_per_s IS NULL) = (device_messages_burst IS NULL)
        AND (device_messages_per_s = 0 OR device_messages_per_s BETWEEN 0.001 AND 1000000)
        AND device_messages_burst BETWEEN 1 AND 1000000000
    );
COMMENT ON COLUMN tenants.messages_per_s IS 'null: as the settings say; 0: no limit';
