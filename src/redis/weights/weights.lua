-- Reads and writes a pool's weights for an operator, whole or not at all, and keeps their history.
--
-- KEYS, all of one slot: the weights (a sorted set), their version (a number), their history (a stream,
-- newest last) and the table as of the newest entry (a sorted set: what differs from it was changed by other
-- programs). ARGV: the operation (look, notice, set, remove, rollback), the version that is expected or "",
-- the author, the reason, the most members of a table and the bytes of an answer with them, the longest
-- history, the most changes that one entry keeps and the bytes of their text, the longest name; then the
-- arguments of the operation: members and weights, members, a version or "". Returns the outcome and the
-- version before it, then the outcome's own values (src/redis/weights/answer.rs reads them). For Redis 6.2
-- and later, also as a Cluster. Weights stay texts: a number would lose digits in cjson.

local key, version_key, history, known_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local wanted, expected, who, why = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local most_members, most_bytes, longest_history = tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7]
local most_changes, most_text, longest_name = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
local FIRST = 11
-- Lua's stack holds some 8,000 arguments of one call.
local ARGUMENTS = 4000
-- Longer than any backend's name.
local NO_NAME = '\0'
-- Bytes that are kept of a name that is longer than any backend's.
local KEPT_OF_A_NAME = 100
-- Bytes around a member and its score in an answer.
local AROUND = 20
-- Members that are read at once, so that a table of long names is refused soon after it is known to be too
-- large.
local PER_READ = 500
-- 2^53, the largest integer that a double holds exactly, less some room for later versions.
local MOST_VERSION = 9007199254000000
-- Entries that one rollback goes through: other clients can add a million entries.
local MOST_STEPS, MOST_STEP_BYTES = 2 * tonumber(longest_history), 32000000

-- Ends the script, and returns the command and the key, which Redis's own messages lack.
local function refuse(command, target, reason)
    error({ command, target, reason }, 0)
end

local function call(command, target, ...)
    local answer = redis.pcall(command, target, ...)
    if type(answer) == 'table' and answer.err then refuse(command, target, answer.err) end
    return answer
end

-- Returns the members of a sorted set by name, and as a list. Refuses a set that is too large for an
-- answer: other clients can write members of 512 MB.
local function read(from)
    local list, held, count, bytes, longest = {}, {}, 0, 0, 0
    repeat
        local page = call('ZRANGE', from, count / 2, count / 2 + PER_READ - 1, 'WITHSCORES')
        for i = 1, #page, 2 do
            local member, score = page[i], page[i + 1]
            held[member] = score
            list[count + 1], list[count + 2] = member, score
            count = count + 2
            bytes = bytes + #member + #score + AROUND
            if #member > longest then longest = #member end
        end
        if count > 2 * most_members then refuse('ZRANGE', from, 'TOOLARGE') end
        if bytes > most_bytes then refuse('ZRANGE', from, 'OVERSIZED ' .. longest) end
    until #page < 2 * PER_READ
    return held, list
end

-- Returns the number of a version; nil where the text is none.
local function version_of(text)
    local version = text and #text <= 16 and text:match('^%d+$') and tonumber(text)
    return version and version <= MOST_VERSION and version or nil
end

-- Returns the version, 0 where there is none. Reads only the beginning of the key: other clients can write
-- 512 MB. Users with the rights of an earlier version may only GET.
local function present_version()
    local text = redis.pcall('GETRANGE', version_key, 0, 31)
    if type(text) == 'table' then
        local whole = redis.pcall('GET', version_key)
        if type(whole) == 'table' then refuse('GET', version_key, whole.err) end
        text = whole or ''
    end
    if text == '' then return 0 end
    return version_of(text) or refuse('GETRANGE', version_key, 'FOREIGN')
end

-- Returns true for a number that ZADD takes, as Redis or cjson writes it.
local function is_weight(text)
    if type(text) ~= 'string' or #text > 40 then return false end
    if text == 'inf' or text == '-inf' then return true end
    local number = text:find('^%-?[%d.]+[eE]?[%+%-]?%d*$') and tonumber(text)
    return number and number == number
end

-- Returns the changes of an entry; nil where statera did not write them.
local function decoded(text)
    if #text > most_text then return nil end
    local done, changes = pcall(cjson.decode, text)
    if not done or type(changes) ~= 'table' then return nil end
    local count = 0
    for place, change in pairs(changes) do
        count = count + 1
        if type(place) ~= 'number' or type(change) ~= 'table' then return nil end
        local name, old, new, bytes = change[1], change[2], change[3], change[4]
        if type(name) ~= 'string' or #name > longest_name then return nil end
        if old ~= cjson.null and not is_weight(old) or new ~= cjson.null and not is_weight(new) then return nil end
        if bytes ~= nil and (type(bytes) ~= 'number' or bytes <= longest_name or bytes ~= math.floor(bytes)) then
            return nil
        end
    end
    return count == #changes and changes or nil
end

-- Compares weights as numbers: servers before and after an upgrade write the same number differently.
local function is_same(a, b)
    return a == b or (a and b and tonumber(a) ~= nil and tonumber(a) == tonumber(b))
end

-- Returns the changes that lead from `old` to `new`: { member, old weight or null, new weight or null }.
local function difference(old, new)
    local changes = {}
    for member, weight in pairs(new) do
        if not is_same(old[member], weight) then
            changes[#changes + 1] = { member, old[member] or cjson.null, weight }
        end
    end
    for member, weight in pairs(old) do
        if not new[member] then changes[#changes + 1] = { member, weight, cjson.null } end
    end
    return changes
end

-- Returns the part that is kept of a name that is too long for a backend. Its last character is dropped
-- where that has several bytes, which may be cut.
local function beginning(name)
    return (name:sub(1, KEPT_OF_A_NAME):gsub('[\192-\255][\128-\191]*$', ''))
end

local function shortened(change)
    local name = change[1]
    if #name <= longest_name then return change end
    return { beginning(name), change[2], change[3], #name }
end

-- Returns the members that may be backends, and the others by the kept part of their names.
local function split(held)
    local short, long = {}, {}
    for name, weight in pairs(held) do
        if #name <= longest_name then
            short[name] = weight
        else
            long[beginning(name) .. NO_NAME .. #name] = weight
        end
    end
    return short, long
end

local function encode(changes)
    if #changes > most_changes then return '' end
    if #changes == 0 then return '[]' end
    local kept = {}
    for i, change in ipairs(changes) do kept[i] = shortened(change) end
    local text = cjson.encode(kept)
    return #text <= most_text and text or ''
end

-- Hashes as src/redis/fleet/content.rs does, which is the hash that proxies report. What cannot be a weight
-- or a backend is left out, by simpler rules.
local function hash(list)
    local parts = {}
    for i = 1, #list, 2 do
        local member, weight = list[i], tonumber(list[i + 1])
        if weight and weight >= 0 and weight < math.huge and #member <= longest_name
            and (member:find(':%d+$') or member:sub(1, 5) == 'unix:') then
            parts[#parts + 1] = member .. '\0' .. struct.pack('>d', weight + 0)
        end
    end
    return redis.sha1hex(table.concat(parts))
end

local function record(what, version, by, reason, back_to, changes, list, text)
    call('XADD', history, 'MAXLEN', '~', longest_history, '*', 'version', version, 'what', what, 'back_to', back_to,
        'who', by, 'why', reason, 'count', #changes, 'changes', text or encode(changes), 'hash',
        hash(list))
end

-- Proves that XADD works, without an entry: Redis refuses the id 0-1, which is below all others, and
-- NOMKSTREAM makes no stream. A stream that is empty, or whose ids are used up, was not made by statera.
local function prove_history()
    local answer = redis.pcall('XADD', history, 'NOMKSTREAM', '0-1', 'a', 'b')
    local reason = type(answer) == 'table' and answer.err or answer
    if not reason or reason:find('equal or smaller', 1, true) then return end
    local is_foreign = type(answer) ~= 'table' or reason:find('exhausted', 1, true)
    refuse('XADD', history, is_foreign and 'FOREIGN' or reason)
end

-- Redis does not undo what a script did before it failed. So every write is tried first in a form that
-- changes nothing: a missing right, no memory and a replica all show here.
local function prove(version, held)
    if wanted ~= 'notice' then
        call('ZADD', key, 'XX', 'GT', '-inf', NO_NAME)
        if not held[NO_NAME] then call('ZREM', key, NO_NAME) end
    end
    call('SET', version_key, version)
    call('ZRANGESTORE', known_key, known_key, 0, -1)
    prove_history()
end

-- Calls `command` on the weights, in pieces that fit on Lua's stack.
local function in_pieces(command, words)
    for from = 1, #words, ARGUMENTS do
        call(command, key, unpack(words, from, math.min(from + ARGUMENTS - 1, #words)))
    end
end

local function write(changes)
    local added, removed = {}, {}
    for _, change in ipairs(changes) do
        if change[3] == cjson.null then
            removed[#removed + 1] = change[1]
        else
            added[#added + 1] = change[3]
            added[#added + 1] = change[1]
        end
    end
    in_pieces('ZADD', added)
    in_pieces('ZREM', removed)
end

-- Refuses a table that is too large: it could not be read, or made smaller again.
local function check(target)
    local members, bytes, longest = 0, 0, 0
    for member, weight in pairs(target) do
        members, longest = members + 1, math.max(longest, #member)
        bytes = bytes + #member + #weight + AROUND
    end
    if members > most_members then refuse('ZADD', key, 'TOOLARGE') end
    if bytes > most_bytes then refuse('ZADD', key, 'OVERSIZED ' .. longest) end
end

local function fields(entry)
    local map = {}
    for i = 1, #entry[2], 2 do map[entry[2][i]] = entry[2][i + 1] end
    return map
end

-- Returns the table at version `target`, made from `known`, the table as of the newest entry, by undoing
-- entry after entry. A version lasts until the next one, so changes by other programs in between belong to
-- it. Only those of the current version are undone, since going back to it would do nothing otherwise. Where
-- there is no table, returns why, and the version in question. A table is returned in the two parts of
-- split.
local function table_at(target, version, known)
    local oldest, from, bytes = version + 1, '+', 0
    local held, long = split(known)
    for _ = 1, MOST_STEPS do
        local entry = call('XREVRANGE', history, from, '-', 'COUNT', 1)[1]
        if not entry then
            if oldest == target + 1 then return held, long end
            return nil, 'forgotten', oldest
        end
        local said = fields(entry)
        local at = version_of(said.version)
        -- Versions never grow on the way back.
        if not at or not said.changes or at > oldest then refuse('XREVRANGE', history, 'FOREIGN') end
        if at < target or at == target and (target < version or said.what ~= 'outside') then
            return held, long
        end
        if said.changes == '' then return nil, 'too_large', at end
        bytes = bytes + #said.changes
        if bytes > MOST_STEP_BYTES then return nil, 'too_far', oldest end
        local changes = decoded(said.changes) or refuse('XREVRANGE', history, 'FOREIGN')
        for _, change in ipairs(changes) do
            local name, weight, length = change[1], change[2], change[4]
            if weight == cjson.null then weight = nil end
            if length then long[name .. NO_NAME .. length] = weight else held[name] = weight end
        end
        oldest = said.what == 'outside' and at + 1 or at
        from = '(' .. entry[1]
    end
    return nil, 'too_far', oldest
end

local function run()
    local version = present_version()
    local newest = call('XREVRANGE', history, '+', '-', 'COUNT', 1)[1]
    -- A version key that was deleted must not give old numbers a new meaning.
    if newest then
        local bytes = 0
        for _, word in ipairs(newest[2]) do bytes = bytes + #word end
        -- Beside the changes an entry has a few hundred bytes.
        if bytes > most_text + 4096 then refuse('XREVRANGE', history, 'FOREIGN') end
        local newest_version = fields(newest).version
        if newest_version and not version_of(newest_version) then refuse('XREVRANGE', history, 'FOREIGN') end
        version = math.max(version, version_of(newest_version) or 0)
    end
    local held, list = read(key)
    local known, known_list = read(known_key)
    local outside = difference(known, held)
    -- If the known table was deleted, or changed by other programs, the table as of the newest entry is
    -- not known, and nothing before it can be undone.
    local left = newest and fields(newest).hash
    local is_lost = left and left ~= hash(known_list)
    local outside_text = is_lost and '' or encode(outside)
    if wanted == 'look' then
        return { 'seen', version, list, outside_text, #outside, newest or false }
    end
    if expected ~= '' and tonumber(expected) ~= version then return { 'conflict', version } end

    local target, back_to, passed_over = {}, '', 0
    for member, weight in pairs(held) do target[member] = weight end
    if wanted == 'set' then
        for i = FIRST, #ARGV, 2 do target[ARGV[i]] = ARGV[i + 1] end
    elseif wanted == 'remove' then
        local missing = {}
        for i = FIRST, #ARGV do
            if not held[ARGV[i]] then missing[#missing + 1] = ARGV[i] end
            target[ARGV[i]] = nil
        end
        if #missing > 0 then return { 'missing', version, missing } end
    elseif wanted == 'rollback' then
        back_to = ARGV[FIRST] == '' and version - 1 or tonumber(ARGV[FIRST])
        if back_to < 0 or back_to > version then return { 'no_such_version', version } end
        if is_lost then return { 'too_large', version, version, back_to } end
        local found, long_or_reason, at = table_at(back_to, version, known)
        if not found then return { long_or_reason, version, at, back_to } end
        target = found
        -- Names that are not kept whole cannot come back, and a rollback of the backends must not depend on
        -- them.
        for name, weight in pairs(held) do
            if #name > longest_name then target[name] = weight end
        end
        local _, long_now = split(held)
        passed_over = #difference(long_or_reason, long_now)
    end

    if wanted == 'set' or wanted == 'rollback' then check(target) end
    local before, changes = version, difference(held, target)
    if is_lost or #outside > 0 or #changes > 0 then
        prove(version, held)
        if is_lost or #outside > 0 then record('outside', version, '', '', '', outside, list, outside_text) end
        if #changes > 0 then
            prove_history()
            write(changes)
            version = version + 1
            call('SET', version_key, version)
            list = call('ZRANGE', key, 0, -1, 'WITHSCORES')
            record(wanted, version, who, why, back_to, changes, list)
        end
        call('ZRANGESTORE', known_key, key, 0, -1)
    end
    return { 'done', before, version, list, encode(changes), #changes, #outside, back_to, passed_over }
end

local done, result = pcall(run)
if done then return result end
if type(result) == 'table' and result[3] then return { 'refused', 0, result[1], result[2], result[3] } end
return redis.error_reply(type(result) == 'table' and result.err or result)
