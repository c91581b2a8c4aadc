-- One connection of an open loop: sends a request and reads its answer, without waiting. It is opened when it is first
-- used, and again after the server has closed it.

local ffi = require("ffi")
ffi.cdef(ffi.os == "OSX" and [[
typedef struct address {
  int flags, family, type, protocol; unsigned length; char *name; void *value; struct address *next;
} address_t;
]] or [[
typedef struct address {
  int flags, family, type, protocol; unsigned length; void *value; char *name; struct address *next;
} address_t;
]])
ffi.cdef [[
int getaddrinfo(const char *host, const char *port, const address_t *wanted, address_t **found);
int socket(int family, int type, int protocol);
int setsockopt(int fd, int level, int option, const void *value, unsigned length);
int fcntl(int fd, int command, ...);
int connect(int fd, const void *address, unsigned length);
long send(int fd, const void *data, size_t length, int flags);
long recv(int fd, void *data, size_t length, int flags);
int close(int fd);
]]
local C = ffi.C
local STREAM, TCP, NODELAY, SET_FLAGS = 1, 6, 1, 4
local NONBLOCKING = ffi.os == "OSX" and 4 or 0x800
local AGAIN = ffi.os == "OSX" and { [35] = true, [36] = true, [57] = true } or { [11] = true, [115] = true } -- not yet
local IDLE = 1       -- seconds after which a server may have closed an unused connection
local ROOM = 2 ^ 18  -- bytes that are read at once
local BROKEN = 0     -- instead of a status

local connection = {}
connection.__index = connection
local buffer, on = ffi.new("char[?]", ROOM), ffi.new("int[1]", 1)
local address

local function look_up(host, port)
  local found = ffi.new("address_t *[1]")
  if C.getaddrinfo(host, tostring(port), ffi.new("address_t", { type = STREAM }), found) ~= 0 then
    error("unknown host " .. host)
  end
  return found[0]
end

-- a connection that is not open yet; `message` is the whole request
function connection.new(host, port, message)
  address = address or look_up(host, port)
  return setmetatable({ fd = -1, message = message, used = 0 }, connection)
end

-- start with a request that was due at the time `due`
function connection:begin(due, now)
  self.due, self.sent, self.is_repeated = due, now, false
  self:restart()
end

function connection:restart()
  if self.fd < 0 then
    self.fd = C.socket(address.family, STREAM, 0)
    C.setsockopt(self.fd, TCP, NODELAY, on, ffi.sizeof(on))
    C.fcntl(self.fd, SET_FLAGS, ffi.cast("int", NONBLOCKING))
    C.connect(self.fd, address.value, address.length) -- a failure shows when sending
    self.used = self.sent
  end
  self.position, self.is_sent, self.got, self.ends = 0, false, nil, nil
end

function connection:close()
  if self.fd >= 0 then C.close(self.fd) end
  self.fd = -1
end

-- continue; return the status of the answer when it is complete, BROKEN if the connection broke, else nil
function connection:proceed(now)
  local status
  if not self.is_sent then status = self:send() end
  if self.is_sent then status = self:receive() end
  if status == BROKEN then
    local was_idle = not self.is_repeated and not self.got and self.sent - self.used > IDLE
    self:close()
    if was_idle then -- the server closed an idle connection: HTTP clients repeat such a request
      self.is_repeated = true
      self:restart()
      return self:proceed(now)
    end
  end
  if status then self.used = now end
  return status
end

function connection:send()
  local data, length = ffi.cast("const char *", self.message), #self.message
  while self.position < length do
    local sent = tonumber(C.send(self.fd, data + self.position, length - self.position, 0))
    if sent < 0 then return not AGAIN[ffi.errno()] and BROKEN or nil end
    self.position = self.position + sent
  end
  self.is_sent = true
end

function connection:receive()
  while true do
    local count = tonumber(C.recv(self.fd, buffer, ROOM, 0))
    if count < 0 then return not AGAIN[ffi.errno()] and BROKEN or nil end
    if count == 0 then return BROKEN end
    local text = ffi.string(buffer, count)
    self.got = self.got and self.got .. text or text
    if self:is_complete() then
      local status = tonumber(self.got:match("^HTTP/1%.%d (%d+)")) or BROKEN
      if self.closes then self:close() end
      return status
    end
  end
end

-- return whether the whole answer is in `got`
function connection:is_complete()
  if not self.ends then
    local _, last = self.got:find("\r\n\r\n", 1, true)
    if not last then return false end
    local head = self.got:sub(1, last):lower()
    self.closes = head:find("\nconnection: *close") ~= nil
    self.is_chunked = head:find("\ntransfer%-encoding: *chunked") ~= nil
    self.ends = last + (tonumber(head:match("\ncontent%-length: *(%d+)")) or 0)
  end
  while self.is_chunked do -- `ends` is where the next chunk begins
    local _, last, size = self.got:find("^(%x+)[^\n]*\n", self.ends + 1)
    if not last then return false end
    self.ends = last + tonumber(size, 16) + 2
    self.is_chunked = tonumber(size, 16) > 0
  end
  return #self.got >= self.ends
end

return connection
