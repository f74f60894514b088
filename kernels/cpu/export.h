// Names under which the versions of an operation for several instruction sets lie in one library.
#pragma once

#define EPI_JOIN_(operation, variant) epi_##operation##_##variant
#define EPI_JOIN(operation, variant) EPI_JOIN_(operation, variant)
#define EPI_EXPORT(operation) extern "C" void EPI_JOIN(operation, EPI_VARIANT)
