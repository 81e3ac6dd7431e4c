import { toJson } from './json.js'
import { fixed } from './number.js'

/** QAPI `ImageCheck`. What does not apply to a format is 0. */
export interface CheckCounters {
  readonly filename: string
  readonly format: string
  readonly checkErrors: number
  readonly corruptions: number
  readonly leaks: number
  readonly corruptionsFixed: number
  readonly leaksFixed: number
  readonly imageEndOffset: number
  readonly totalClusters: number
  readonly allocatedClusters: number
  readonly fragmentedClusters: number
  readonly compressedClusters: number
}

export function formatCheck(check: CheckCounters): string {
  const parts = [repaired(check), findings(check), statistics(check)]
  if (check.imageEndOffset !== 0) parts.push(`Image end offset: ${check.imageEndOffset}\n`)
  return parts.join('')
}

function repaired({ leaksFixed, corruptionsFixed }: CheckCounters): string {
  if (leaksFixed === 0 && corruptionsFixed === 0) return ''
  return (
    'The following inconsistencies were found and repaired:\n\n' +
    `    ${leaksFixed} leaked clusters\n    ${corruptionsFixed} corruptions\n\n` +
    'Double checking the fixed image now...\n'
  )
}

function findings({ corruptions, leaks, checkErrors }: CheckCounters): string {
  if (corruptions === 0 && leaks === 0 && checkErrors === 0) return 'No errors were found on the image.\n'
  let text = ''
  if (corruptions !== 0) {
    text +=
      `\n${corruptions} errors were found on the image.\n` +
      'Data may be corrupted, or further writes to the image may corrupt it.\n'
  }
  if (leaks !== 0) {
    text += `\n${leaks} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n`
  }
  if (checkErrors !== 0) text += `\n${checkErrors} internal errors have occurred during the check.\n`
  return text
}

function statistics(check: CheckCounters): string {
  const { allocatedClusters: allocated, totalClusters: total } = check
  if (total === 0 || allocated === 0) return ''
  const percent = (part: number, whole: number): string => `${fixed((part * 100) / whole, 2)}%`
  return (
    `${allocated}/${total} = ${percent(allocated, total)} allocated, ` +
    `${percent(check.fragmentedClusters, allocated)} fragmented, ` +
    `${percent(check.compressedClusters, allocated)} compressed clusters\n`
  )
}

/** Counters of zero are absent, as QAPI's optional fields are, save the one that is not optional. */
export function checkJson(check: CheckCounters): string {
  const counted = (value: number): number | undefined => (value === 0 ? undefined : value)
  return `${toJson({
    filename: check.filename,
    format: check.format,
    'check-errors': check.checkErrors,
    'image-end-offset': counted(check.imageEndOffset),
    corruptions: counted(check.corruptions),
    leaks: counted(check.leaks),
    'corruptions-fixed': counted(check.corruptionsFixed),
    'leaks-fixed': counted(check.leaksFixed),
    'total-clusters': counted(check.totalClusters),
    'allocated-clusters': counted(check.allocatedClusters),
    'fragmented-clusters': counted(check.fragmentedClusters),
    'compressed-clusters': counted(check.compressedClusters),
  })}\n`
}

/** qemu-img's exit codes: 0 clean, 1 not completed, 2 corrupt, 3 leaks only. */
export function checkExitCode({ checkErrors, corruptions, leaks }: CheckCounters): 0 | 1 | 2 | 3 {
  if (checkErrors !== 0) return 1
  if (corruptions !== 0) return 2
  return leaks !== 0 ? 3 : 0
}
