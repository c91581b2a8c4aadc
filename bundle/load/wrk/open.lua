-- Open loop: requests are due at random times, drawn before the run (a Poisson process). The next free client takes the
-- next request. Latency counts from the time when the request was due, not from when it was sent.
-- Each client has its own thread, so it knows which request it waits for, and can sleep until the next one is due.

local ffi = require("ffi")
local clients = dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "clients.lua")
ffi.cdef "void *realloc(void *memory, size_t size);"

local IDLE = 1     -- seconds after which a server may have closed an unused connection
local PAUSE = 0.01 -- seconds that a client waits after a failure

answered, failed, last, in_flight, latencies_address = 0, 0, 0, false, 0
local start, due, sent, idle_since
local is_repeated = false
local latencies, room = nil, 0

local function arrivals(rate)
  math.randomseed(tonumber(os.getenv("LOAD_SEED")))
  local times, time = {}, 0
  while true do
    time = time - math.log(1 - math.random()) / rate
    if time >= clients.seconds then return times end
    times[#times + 1] = time
  end
end

function setup(thread)
  if not clients.shared then
    local times = arrivals(tonumber(os.getenv("LOAD_RATE")))
    clients.share(times)
    in_all = #times
  end
  clients.add(thread)
  thread:set("in_all", in_all)
end

-- return when the next request is due; nil if there are no more
local function take()
  local index = clients.take()
  return index < in_all and start + clients.shared.due[index] or nil
end

local function record(latency)
  if answered == room then
    room = math.max(256, 2 * room)
    latencies = ffi.cast("double *", ffi.C.realloc(latencies, 8 * room))
    latencies_address = tonumber(ffi.cast("intptr_t", latencies))
  end
  latencies[answered] = latency
  answered = answered + 1
end

function request()
  local message, is_trial = clients.message()
  if is_trial then return message end
  if not start then
    start = clients.start()
    due, idle_since = take(), start
  end
  if in_flight then -- the connection broke before the answer
    if not is_repeated and sent - idle_since > IDLE then
      is_repeated = true -- the server closed an idle connection: HTTP clients repeat such a request
      return message
    end
    failed, in_flight = failed + 1, false
    clients.sleep_until(clients.now() + PAUSE)
    due = take()
  end
  if not due then
    clients.finish()
    return "" -- nothing is sent
  end
  clients.sleep_until(due)
  sent, in_flight, is_repeated = clients.now(), true, false
  return message
end

function response(status)
  local time = clients.now()
  if status >= 200 and status < 300 and time - sent <= clients.timeout then
    record(time - due)
    last = time - start
  else
    failed = failed + 1
  end
  in_flight, idle_since, due = false, time, take()
  if not due then clients.finish() end
end

function done()
  local result = { last = 0, failed = clients.sum("failed"), in_time = 0 }
  local seen = {}
  for _, thread in ipairs(clients.all) do
    if thread:get("in_flight") then result.failed = result.failed + 1 end
    result.last = math.max(result.last, thread:get("last"))
    local values = ffi.cast("double *", thread:get("latencies_address"))
    for i = 0, thread:get("answered") - 1 do table.insert(seen, values[i]) end
  end
  result.answered = #seen
  result.failed = result.failed + math.max(0, in_all - clients.shared.taken) -- no client was free to send them
  table.sort(seen)
  for name, share in pairs({ p50 = 0.50, p95 = 0.95, p99 = 0.99, longest = 1 }) do
    result[name] = seen[math.max(1, math.ceil(share * #seen))]
  end
  clients.report(result)
end
