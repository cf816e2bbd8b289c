# SPDX-License-Identifier: MIT
"""The C library's names, as Python functions with the same arguments. facade_base.py has the conventions.

    init_swap_system(512 << 20, 4096, 0.8)
    ptr = allocate_gpu_memory(1 << 20)
    write_memory(ptr, b"weights")
    free_gpu_memory(ptr)
    cleanup_swap_system()

Beside them are the classes that they stand for: GpuMemory and what is passed to it.
"""

from dpud.gpu.facade_address_space import ACCESS_EXECUTE as ACCESS_EXECUTE
from dpud.gpu.facade_address_space import ACCESS_READ as ACCESS_READ
from dpud.gpu.facade_address_space import ACCESS_READ_WRITE as ACCESS_READ_WRITE
from dpud.gpu.facade_address_space import ACCESS_WRITE as ACCESS_WRITE
from dpud.gpu.facade_address_space import MEMORY_TYPE_DEVICE as MEMORY_TYPE_DEVICE
from dpud.gpu.facade_address_space import MEMORY_TYPE_HOST as MEMORY_TYPE_HOST
from dpud.gpu.facade_address_space import MEMORY_TYPE_MANAGED as MEMORY_TYPE_MANAGED
from dpud.gpu.facade_address_space import MEMORY_TYPE_PINNED as MEMORY_TYPE_PINNED
from dpud.gpu.facade_address_space import access_unified_memory as access_unified_memory
from dpud.gpu.facade_address_space import allocate_unified_memory as allocate_unified_memory
from dpud.gpu.facade_address_space import cleanup_unified_address_space as cleanup_unified_address_space
from dpud.gpu.facade_address_space import free_unified_memory as free_unified_memory
from dpud.gpu.facade_address_space import get_address_space_stats as get_address_space_stats
from dpud.gpu.facade_address_space import init_unified_address_space as init_unified_address_space
from dpud.gpu.facade_address_space import print_address_space_stats as print_address_space_stats
from dpud.gpu.facade_address_space import read_memory as read_memory
from dpud.gpu.facade_address_space import sync_memory_region as sync_memory_region
from dpud.gpu.facade_address_space import write_memory as write_memory
from dpud.gpu.facade_base import Ref as Ref
from dpud.gpu.facade_base import last_error as last_error
from dpud.gpu.facade_base import the_memory as the_memory
from dpud.gpu.facade_compression import COMPRESS_ADAPTIVE as COMPRESS_ADAPTIVE
from dpud.gpu.facade_compression import COMPRESS_LZ4 as COMPRESS_LZ4
from dpud.gpu.facade_compression import COMPRESS_SNAPPY as COMPRESS_SNAPPY
from dpud.gpu.facade_compression import COMPRESS_ZSTD as COMPRESS_ZSTD
from dpud.gpu.facade_compression import QUALITY_BALANCED as QUALITY_BALANCED
from dpud.gpu.facade_compression import QUALITY_BEST as QUALITY_BEST
from dpud.gpu.facade_compression import QUALITY_FAST as QUALITY_FAST
from dpud.gpu.facade_compression import cleanup_compression_system as cleanup_compression_system
from dpud.gpu.facade_compression import compress_memory as compress_memory
from dpud.gpu.facade_compression import decompress_memory as decompress_memory
from dpud.gpu.facade_compression import get_compression_stats as get_compression_stats
from dpud.gpu.facade_compression import init_compression_system as init_compression_system
from dpud.gpu.facade_compression import print_compression_stats as print_compression_stats
from dpud.gpu.facade_defragmentation import cleanup_defragmentation_manager as cleanup_defragmentation_manager
from dpud.gpu.facade_defragmentation import get_defragmentation_stats as get_defragmentation_stats
from dpud.gpu.facade_defragmentation import init_defragmentation_manager as init_defragmentation_manager
from dpud.gpu.facade_defragmentation import pin_gpu_memory as pin_gpu_memory
from dpud.gpu.facade_defragmentation import print_defragmentation_stats as print_defragmentation_stats
from dpud.gpu.facade_defragmentation import run_defragmentation as run_defragmentation
from dpud.gpu.facade_defragmentation import unpin_gpu_memory as unpin_gpu_memory
from dpud.gpu.facade_fault_recovery import RECOVERY_CHECKPOINT_RESTORE as RECOVERY_CHECKPOINT_RESTORE
from dpud.gpu.facade_fault_recovery import RECOVERY_FAILOVER as RECOVERY_FAILOVER
from dpud.gpu.facade_fault_recovery import RECOVERY_MIGRATE as RECOVERY_MIGRATE
from dpud.gpu.facade_fault_recovery import RECOVERY_REMAP as RECOVERY_REMAP
from dpud.gpu.facade_fault_recovery import RECOVERY_RETRY as RECOVERY_RETRY
from dpud.gpu.facade_fault_recovery import acknowledge_fault_events as acknowledge_fault_events
from dpud.gpu.facade_fault_recovery import cleanup_fault_recovery as cleanup_fault_recovery
from dpud.gpu.facade_fault_recovery import create_memory_checkpoint as create_memory_checkpoint
from dpud.gpu.facade_fault_recovery import get_fault_recovery_stats as get_fault_recovery_stats
from dpud.gpu.facade_fault_recovery import init_fault_recovery as init_fault_recovery
from dpud.gpu.facade_fault_recovery import inject_memory_fault as inject_memory_fault
from dpud.gpu.facade_fault_recovery import predict_faults as predict_faults
from dpud.gpu.facade_fault_recovery import print_fault_recovery_stats as print_fault_recovery_stats
from dpud.gpu.facade_fault_recovery import restore_memory_checkpoint as restore_memory_checkpoint
from dpud.gpu.facade_fault_recovery import scrub_memory as scrub_memory
from dpud.gpu.facade_fault_recovery import set_recovery_policy as set_recovery_policy
from dpud.gpu.facade_migration import MIGRATION_AUTO as MIGRATION_AUTO
from dpud.gpu.facade_migration import MIGRATION_HYBRID as MIGRATION_HYBRID
from dpud.gpu.facade_migration import MIGRATION_POST_COPY as MIGRATION_POST_COPY
from dpud.gpu.facade_migration import MIGRATION_PRE_COPY as MIGRATION_PRE_COPY
from dpud.gpu.facade_migration import MIGRATION_STOP_AND_COPY as MIGRATION_STOP_AND_COPY
from dpud.gpu.facade_migration import MigrationStrategy as MigrationStrategy
from dpud.gpu.facade_migration import cleanup_migration_manager as cleanup_migration_manager
from dpud.gpu.facade_migration import get_migration_stats as get_migration_stats
from dpud.gpu.facade_migration import init_migration_manager as init_migration_manager
from dpud.gpu.facade_migration import print_migration_stats as print_migration_stats
from dpud.gpu.facade_migration import receive_memory_migration as receive_memory_migration
from dpud.gpu.facade_migration import start_memory_migration as start_memory_migration
from dpud.gpu.facade_numa import cleanup_numa_memory_manager as cleanup_numa_memory_manager
from dpud.gpu.facade_numa import get_numa_stats as get_numa_stats
from dpud.gpu.facade_numa import init_numa_memory_manager as init_numa_memory_manager
from dpud.gpu.facade_numa import print_numa_stats as print_numa_stats
from dpud.gpu.facade_numa import set_numa_policy as set_numa_policy
from dpud.gpu.facade_overcommit import allocate_overcommit_memory as allocate_overcommit_memory
from dpud.gpu.facade_overcommit import cleanup_memory_overcommit as cleanup_memory_overcommit
from dpud.gpu.facade_overcommit import free_overcommit_memory as free_overcommit_memory
from dpud.gpu.facade_overcommit import get_overcommit_stats as get_overcommit_stats
from dpud.gpu.facade_overcommit import init_memory_overcommit as init_memory_overcommit
from dpud.gpu.facade_overcommit import print_overcommit_stats as print_overcommit_stats
from dpud.gpu.facade_qos import ACCESS_TYPE_READ as ACCESS_TYPE_READ
from dpud.gpu.facade_qos import ACCESS_TYPE_WRITE as ACCESS_TYPE_WRITE
from dpud.gpu.facade_qos import BANDWIDTH_POLICY_ADAPTIVE as BANDWIDTH_POLICY_ADAPTIVE
from dpud.gpu.facade_qos import BANDWIDTH_POLICY_FAIR as BANDWIDTH_POLICY_FAIR
from dpud.gpu.facade_qos import BANDWIDTH_POLICY_PRIORITY as BANDWIDTH_POLICY_PRIORITY
from dpud.gpu.facade_qos import QOS_LEVEL_BACKGROUND as QOS_LEVEL_BACKGROUND
from dpud.gpu.facade_qos import QOS_LEVEL_CRITICAL as QOS_LEVEL_CRITICAL
from dpud.gpu.facade_qos import QOS_LEVEL_HIGH as QOS_LEVEL_HIGH
from dpud.gpu.facade_qos import QOS_LEVEL_LOW as QOS_LEVEL_LOW
from dpud.gpu.facade_qos import QOS_LEVEL_NORMAL as QOS_LEVEL_NORMAL
from dpud.gpu.facade_qos import cleanup_memory_qos as cleanup_memory_qos
from dpud.gpu.facade_qos import get_qos_stats as get_qos_stats
from dpud.gpu.facade_qos import init_memory_qos as init_memory_qos
from dpud.gpu.facade_qos import process_memory_requests as process_memory_requests
from dpud.gpu.facade_qos import set_client_qos as set_client_qos
from dpud.gpu.facade_qos import submit_memory_request as submit_memory_request
from dpud.gpu.facade_swap import access_gpu_memory as access_gpu_memory
from dpud.gpu.facade_swap import allocate_gpu_memory as allocate_gpu_memory
from dpud.gpu.facade_swap import background_swap as background_swap
from dpud.gpu.facade_swap import cleanup_swap_system as cleanup_swap_system
from dpud.gpu.facade_swap import free_gpu_memory as free_gpu_memory
from dpud.gpu.facade_swap import get_swap_stats as get_swap_stats
from dpud.gpu.facade_swap import init_swap_system as init_swap_system
from dpud.gpu.facade_swap import print_swap_stats as print_swap_stats
