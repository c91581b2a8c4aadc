-- Open loop: requests are due at random times, drawn before the run (a Poisson process). The next free connection takes
-- the next request. Latency counts from the time when the request was due, not from when it was sent.
-- wrk does not say which connection an answer came on, so that each thread could wait for one answer only. Hundreds of
-- threads took four times as much CPU per request. So one thread of wrk runs the loop below, instead of wrk's own.

local ffi = require("ffi")
local folder = debug.getinfo(1, "S").source:match("^@(.*/)")
local clients = dofile(folder .. "clients.lua")
local connection = dofile(folder .. "connection.lua")
ffi.cdef [[
void *realloc(void *memory, size_t size);
typedef struct { int fd; short events, revents; } pollfd_t;
int poll(pollfd_t *all, unsigned long count, int milliseconds);
int ppoll(pollfd_t *all, unsigned long count, const duration_t *longest, const void *signals);
]]

local IN, OUT = 1, 4 -- events of poll
local TICK = 0.05    -- seconds between two searches for requests that have timed out

answered, failed, last, latencies_address = 0, 0, 0, 0
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
  local times = arrivals(tonumber(os.getenv("LOAD_RATE")))
  clients.share(times)
  clients.add(thread)
  thread:set("in_all", #times)
end

local function record(latency)
  if answered == room then
    room = math.max(4096, 2 * room)
    latencies = ffi.cast("double *", ffi.C.realloc(latencies, 8 * room))
    latencies_address = tonumber(ffi.cast("intptr_t", latencies))
  end
  latencies[answered] = latency
  answered = answered + 1
end

local timer = ffi.new("duration_t")
local function wait(events, count, seconds)
  if ffi.os == "Linux" then
    local whole = math.floor(seconds)
    timer.seconds, timer.nanoseconds = whole, (seconds - whole) * 1e9
    ffi.C.ppoll(events, count, timer, nil)
  else
    ffi.C.poll(events, count, math.floor(seconds * 1000)) -- checks again and again in the last millisecond
  end
end

-- send every request and wait for the answers
local function run(message)
  local most = tonumber(os.getenv("LOAD_CONNECTIONS"))
  local due, start = ffi.cast("double *", clients.shared.due), clients.start()
  local stop = start + clients.seconds + clients.timeout -- requests that are not sent by then have failed
  local events = ffi.new("pollfd_t[?]", most)
  local free, busy, opened, next_due, checked = {}, {}, 0, 0, start

  local function leave(index) -- the last busy connection takes the place of the one that leaves
    local count = #busy
    free[#free + 1] = busy[index]
    busy[index], events[index - 1] = busy[count], events[count - 1]
    busy[count] = nil
  end

  local function fail(index)
    failed = failed + 1
    busy[index]:close()
    leave(index)
  end

  local function proceed(index, time)
    local each = busy[index]
    local status = each:proceed(time)
    events[index - 1].fd, events[index - 1].events = each.fd, each.is_sent and IN or OUT
    if not status then return end -- the answer is not complete
    if status >= 200 and status < 300 and time - each.sent <= clients.timeout then
      record(time - each.due)
      last = time - start
    else
      failed = failed + 1
    end
    leave(index)
  end

  while true do
    local time = clients.now()
    while next_due < in_all and start + due[next_due] <= time and time < stop and (#free > 0 or opened < most) do
      local each = table.remove(free)
      if not each then
        each, opened = connection.new(wrk.host, wrk.port, message), opened + 1
      end
      busy[#busy + 1] = each
      each:begin(start + due[next_due], time)
      proceed(#busy, time)
      next_due = next_due + 1
    end
    if #busy == 0 and (next_due == in_all or time >= stop) then break end

    local longest = TICK
    if next_due < in_all and (#free > 0 or opened < most) then
      longest = math.min(longest, math.max(0, start + due[next_due] - clients.now()))
    end
    wait(events, #busy, longest)
    time = clients.now()
    for index = #busy, 1, -1 do
      if events[index - 1].revents ~= 0 then proceed(index, time) end
    end
    if time - checked > TICK then
      for index = #busy, 1, -1 do
        if time - busy[index].sent > clients.timeout then fail(index) end
      end
      checked = time
    end
  end
  failed = failed + in_all - next_due
end

function request()
  local message, is_trial = clients.message()
  if is_trial then return message end
  run(message)
  clients.finish()
  return "" -- wrk's own connection sends nothing
end

function done()
  local thread = clients.all[1]
  local result = { last = thread:get("last"), failed = thread:get("failed"), answered = thread:get("answered"), in_time = 0 }
  local values, seen = ffi.cast("double *", thread:get("latencies_address")), {}
  for i = 1, result.answered do seen[i] = values[i - 1] end
  table.sort(seen)
  for name, share in pairs({ p50 = 0.50, p95 = 0.95, p99 = 0.99, longest = 1 }) do
    result[name] = seen[math.max(1, math.ceil(share * #seen))]
  end
  clients.report(result)
end
