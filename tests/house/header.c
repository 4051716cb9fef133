/* The public header is C99 and needs nothing but the C library; every INIT macro initialises its struct. */
#include <fusco/fusco.h>

int fuscoHeaderIsC(void);
int fuscoHeaderIsC(void) {
  fuscoConfig_t config = FUSCO_CONFIG_INIT;
  fuscoStatistics_t statistics = FUSCO_STATISTICS_INIT;
  fuscoPlanConfig_t plan = FUSCO_PLAN_CONFIG_INIT;
  fuscoPlanInfo_t info = FUSCO_PLAN_INFO_INIT;
  fuscoDispatchArgs_t dispatch = FUSCO_DISPATCH_INIT;
  fuscoCombineArgs_t combine = FUSCO_COMBINE_INIT;
  fuscoCombineBackwardArgs_t backward = FUSCO_COMBINE_BACKWARD_INIT;
  return config.size == sizeof config && statistics.size == sizeof statistics && plan.size == sizeof plan &&
         info.size == sizeof info && dispatch.size == sizeof dispatch && combine.size == sizeof combine &&
         backward.size == sizeof backward && config.maxStagingBytes == FUSCO_UNSET && combine.weighted == 1;
}
