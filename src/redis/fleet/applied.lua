-- Keeps which proxy has applied which table: a hash of proxy → "end of its lease in server milliseconds, a
-- space, content hash". Two fields belong to no proxy: `since` tells when a proxy last came back to the hash
-- (a reader that looks before all can have reported again may not see all), and `cleaned` when, and how far,
-- fields were last checked.
--
-- KEYS: that hash. ARGV is one of:
-- * report, the proxy, what it has applied, its lease in milliseconds, and "first" in this proxy's life, "again"
--   over another connection, or "";
-- * leave, the proxy;
-- * live, the most proxies, a lease, and the time within which all proxies that are alive report again.
-- live returns { milliseconds until all of these are known, proxy, what it has applied, how many
-- milliseconds ago it reported that, … }. Only the server's clock counts, since those of the proxies may
-- differ. The key expires with the last lease.
--
-- Other clients can write here too, a million fields or values of 512 MB. A report still costs the server a
-- bounded time: it reads no more than one step of fields, and all proxies together make one step a second at
-- most.

local applied, wanted = KEYS[1], ARGV[1]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local SINCE, CLEANED = 'since', 'cleaned'
-- Longest name of a proxy, and longest report: a thousand draining backends of 260 bytes each with their
-- sessions, and a hundred that get no sessions with the reasons.
local LONGEST_NAME, LONGEST_REPORT = 300, 350000
-- Fields in a step, and bytes of them. HSCAN is asked for ten at a time, so that a step ends soon after its
-- bound.
local STEP_FIELDS, STEP_BYTES, PER_SCAN = 1000, 1000000, 10
-- Milliseconds between two steps, and after a walk through all fields.
local STEP_PAUSE, WALK_PAUSE = 1000, 5000
-- The most bytes of an answer to live.
local MOST_BYTES = 8000000

-- Returns when the lease ends and what was applied; nil where it has ended, or is not valid.
local function lease(name, value)
    if #name > LONGEST_NAME or #value > LONGEST_REPORT then return nil end
    local ends, content = value:match('^(%d+) (%S+)$')
    ends = tonumber(ends)
    if not ends or ends < now then return nil end
    return ends, content
end

-- Deletes, in one step, some reports whose lease has ended. A user without the right to do so leaves it to
-- others.
local function clean()
    local last = redis.call('HSTRLEN', applied, CLEANED) <= 40 and redis.call('HGET', applied, CLEANED) or ''
    local at, cursor = last:match('^(%d+)/(%d+)$')
    local pause = cursor == '0' and WALK_PAUSE or STEP_PAUSE
    -- A clock that was set back must not stop this.
    if at and now - at < pause and now >= tonumber(at) then return end
    local seen, bytes = 0, 0
    cursor = cursor or '0'
    repeat
        local scanned = redis.pcall('HSCAN', applied, cursor, 'COUNT', PER_SCAN)
        if scanned.err and cursor ~= '0' then
            -- Another client has written a cursor that no scan returns.
            cursor = '0'
            scanned = redis.pcall('HSCAN', applied, cursor, 'COUNT', PER_SCAN)
        end
        if scanned.err then return end
        local fields = scanned[2]
        cursor = scanned[1]
        for i = 1, #fields, 2 do
            local name, value = fields[i], fields[i + 1]
            seen, bytes = seen + 1, bytes + #name + #value
            if name ~= SINCE and name ~= CLEANED and not lease(name, value) then
                redis.call('HDEL', applied, name)
            end
        end
        -- Where most fields are gone, a scan finds few.
        seen = seen + 1
    until cursor == '0' or seen >= STEP_FIELDS or bytes >= STEP_BYTES
    redis.call('HSET', applied, CLEANED, string.format('%.0f/%s', now, cursor))
end

if wanted == 'report' then
    local length = tonumber(ARGV[4])
    local is_added = redis.call('HSET', applied, ARGV[2], string.format('%.0f %s', now + length, ARGV[3])) == 1
    redis.call('PEXPIRE', applied, length)
    -- The server was away, or has lost this proxy's report. A proxy that starts is no sign of that.
    local is_back = ARGV[5] == 'again' or is_added and ARGV[5] ~= 'first'
    if is_back or redis.call('HSTRLEN', applied, SINCE) == 0 then
        redis.call('HSET', applied, SINCE, string.format('%.0f', now))
    end
    clean()
    return redis.status_reply('OK')
end

if wanted == 'leave' then
    redis.call('HDEL', applied, ARGV[2])
    return redis.status_reply('OK')
end

local function too_large()
    return redis.error_reply('TOOLARGE ' .. applied .. ' holds more than proxies write there')
end

if redis.call('HLEN', applied) > tonumber(ARGV[2]) + 2 then return too_large() end
local length, patience = tonumber(ARGV[3]), tonumber(ARGV[4])
local live, is_known, overdue, bytes, cursor = {}, {}, 0, 0, '0'
local since
repeat
    local scanned = redis.pcall('HSCAN', applied, cursor, 'COUNT', PER_SCAN)
    -- For users with the rights that an earlier version needed.
    if scanned.err then scanned = { '0', redis.call('HGETALL', applied) } end
    local fields = scanned[2]
    cursor = scanned[1]
    for i = 1, #fields, 2 do
        local name, value = fields[i], fields[i + 1]
        local ends, content = lease(name, value)
        bytes = bytes + #name + #value
        if name == SINCE then since = tonumber(value) end
        -- A scan may return a field twice.
        if ends and name ~= SINCE and name ~= CLEANED and not is_known[name] then
            is_known[name] = true
            live[#live + 1] = name
            live[#live + 1] = content
            live[#live + 1] = string.format('%.0f', math.max(now - (ends - length), 0))
            -- A report that should have been renewed by now: the server was away, or the proxy is gone.
            -- Others may be too.
            if ends - length + patience < now then overdue = math.max(overdue, ends - now + 1) end
        end
    end
    if bytes > MOST_BYTES then return too_large() end
until cursor == '0'
local wait = since and since <= now and patience - (now - since) or patience
table.insert(live, 1, math.max(wait, overdue, 0))
return live
