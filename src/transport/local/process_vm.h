// Rows between this process's memory and a peer's private memory, with lists on both sides (process_vm_readv/writev).
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <span>
#include <string>

#include "transport/transport.h"

namespace fusco::transport {

enum class VmDirection { read, write };

// Moves all bytes of `local` from or to `remote`, whatever the lists' borders; totals must agree. `peer` names the rank
// in errors. Throws invalidArgument (a list points to memory that is not there), remoteError (the process has gone),
// systemError (the kernel forbids it).
void moveVm(VmDirection direction, pid_t pid, const std::string& peer, std::span<const Segment> local,
            std::span<const Segment> remote);

// The same within this process.
void moveLocal(VmDirection direction, std::span<const Segment> local, std::span<const Segment> remote);

// Whether the word at `address` of the process can be read and has the value, so that the process is the one we mean.
bool probeVm(pid_t pid, std::uint64_t address, std::uint64_t value);

}  // namespace fusco::transport
