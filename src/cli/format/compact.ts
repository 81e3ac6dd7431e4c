import type { CompactResult } from '../../index.js'
import { toJson } from './json.js'
import { humanSize } from './number.js'

/** A compaction's result for people. */
export function formatCompact(result: CompactResult, dryRun: boolean): string {
  const { fileLengthBefore, fileLengthAfter, actualSizeBefore, actualSizeAfter } = result
  const counts = [
    [result.leakedClusters, 'leaked'],
    [result.zeroClusters, 'of zeroes'],
    [result.movedClusters, dryRun ? 'to move' : 'moved'],
  ] as const
  const clusters = counts.filter(([count]) => count > 0).map(([count, what]) => `${count} ${what}`)
  const lines = [
    `${dryRun ? 'would reclaim' : 'reclaimed'}: ${humanSize(result.reclaimedBytes)} (${result.reclaimedBytes} bytes)`,
    `disk size: ${humanSize(actualSizeBefore)} -> ${humanSize(actualSizeAfter)}`,
    `file length: ${humanSize(fileLengthBefore)} -> ${humanSize(fileLengthAfter)}`,
    ...(clusters.length === 0 ? [] : [`clusters: ${clusters.join(', ')}`]),
  ]
  return `${lines.join('\n')}\n`
}

export const compactJson = (result: CompactResult): string =>
  `${toJson({
    'reclaimed-bytes': result.reclaimedBytes,
    'file-length-before': result.fileLengthBefore,
    'file-length-after': result.fileLengthAfter,
    'actual-size-before': result.actualSizeBefore,
    'actual-size-after': result.actualSizeAfter,
    'leaked-clusters': result.leakedClusters,
    'zero-clusters': result.zeroClusters,
    'moved-clusters': result.movedClusters,
  })}\n`
