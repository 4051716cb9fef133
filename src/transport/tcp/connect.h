// TCP sockets: listening, connecting without waiting, and what the kernel says of the peer's. All are non-blocking and
// closed on exec.
#pragma once

#include <cstdint>

#include "base/handle.h"
#include "transport/tcp/address.h"

namespace fusco::transport {

// Listens at the address; port 0: the kernel's choice, which is entered. `shared`: the port may still be held by
// connections of a listener before. Empty: the port is taken. Throws Error(systemError).
UniqueFd listenTcp(Address* address, int backlog, bool shared = false);

// Begins to connect, from `from` (its port 0) if that is an address. Empty: it has failed at once, errno says why.
UniqueFd beginConnect(const Address& to, const Address& from = {});
// For a socket that has become writable or broken: 0 if it is connected, else why not (an errno). Who is connected with
// itself has found nobody.
int connectResult(int socket);

// No delay, keepalive, and broken (ETIMEDOUT) when the peer's kernel has acknowledged nothing for `milliseconds`. Not
// for connections on which the peer may stop to read: a closed window counts as silence.
void watchConnection(int socket, int milliseconds);
// No more, as for a new one.
void unwatchConnection(int socket);

// For those, with heartbeats: no delay, keepalive. Broken only where nothing is under way.
void keepConnection(int socket, int milliseconds);
// Whether the peer's kernel has acknowledged nothing for so long although it was asked.
bool peerKernelIsSilent(int socket, int milliseconds);

}  // namespace fusco::transport
