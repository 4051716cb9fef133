// How ranks meet: one of them opens a meeting place, all bring their record and take everyone's home.
#pragma once

#include <string>
#include <vector>

#include "base/clock.h"
#include "comm/lobby.h"
#include "comm/record.h"

namespace fusco::comm {

// Opens the meeting place and the thread that serves it. Other machines reach it by `network`, the process's setting
// FUSCO_NET allowing; where there is no network, the id serves its own machine only.
UniqueId openMeetingPlace(Lobby::Patience patience = {});

// An id that everyone who knows address and key makes alike: rank 0 opens its meeting place when it connects. Each call
// of a process stands for one more init. `secret` may be empty: then the key only tells jobs apart, and whoever knows
// the address can take part.
UniqueId agreeOnMeetingPlace(const std::string& hostAndPort, const std::string& secret, const std::string& job);
// What rank 0 of such an id does first.
void openAgreedPlace(const UniqueId& id);

// Brings the record, waits for all ranks; their records in rank order. Throws Error with the meeting place's verdict.
std::vector<Record> meet(const UniqueId& id, const Record& record, Deadline deadline);

// Tells the meeting place of a record with a failure, so that the others need not wait for their time-outs. Does what
// can be done before the deadline, and never throws.
void tellFailure(const UniqueId& id, const Record& failed, Deadline deadline);

// Ends the threads behind the id, if they run in this process and have nothing more to do.
void leaveMeetingPlace(const UniqueId& id);

// Counts the forks of this process and its ancestors since they loaded the library.
unsigned forkCount();

// Random, the same for all ranks of a process; another one after fork.
void processIdentity(std::uint64_t identity[2]);

// The machine's boot id, hashed.
std::uint64_t bootIdentity();

// Ranks with the same one can share memory and abstract sockets: boot id, network namespace and `hostId`, hashed. So a
// host id divides a machine, and never makes one of two.
std::uint64_t domainIdentity(const std::string& hostId);

// Names the namespace in which this process's pid counts; 0 if unknown.
std::uint64_t pidNamespace();

}  // namespace fusco::comm
