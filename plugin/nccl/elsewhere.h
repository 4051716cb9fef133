// Ranks on other machines than the place where the ranks meet can only be missed there, for as long as patience lasts.
// So they say that they are elsewhere, over TCP: nobody has to wait for them then, and nobody carries.
#pragma once

#include <cstdint>

#include "plugin/nccl/meeting.h"

namespace fusco::nccl {

// Who can meet by abstract sockets: boot, network namespace, FUSCO_HOSTID.
std::uint64_t machineIdentity();

// What is said. The name is the tag's, which nobody knows by chance; a stranger who knows it can at most have NCCL
// carry.
struct Elsewhere {
  static constexpr std::uint64_t kMagic = 0x5357454c4543434e;
  std::uint64_t magic = kMagic;
  std::uint64_t name[2] = {};
  std::int32_t rank = 0, ranks = 0;
};
static_assert(sizeof(Elsewhere) == 32);

// Listens on all addresses; the port comes back, 0 when that cannot be.
Socket listenForElsewhere(std::uint16_t& port);
// To the port of the tag, at the address that NCCL has put into its part of the id. Bounded; nothing where it fails.
void sayElsewhere(const ncclUniqueId& id, const Tag& tag, int rank, int ranks);

}  // namespace fusco::nccl
