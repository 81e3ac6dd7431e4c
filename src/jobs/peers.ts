/** BullMQ, which is there where somebody installed it. */

import type * as BullMq from 'bullmq'
import { Qcow2Error } from '../errors.js'

export type Queues = typeof BullMq

const PACKAGES = 'bullmq and ioredis'
const INSTALL = 'npm install bullmq ioredis'

/** Loads BullMQ and what it reaches Redis by, or says what is to be installed. */
export function loadBullMq(): Queues {
  try {
    // Calls of `require` inside of a `try`: a bundler leaves what is not installed alone; and BullMQ's ES modules do not find its client.
    require('ioredis')
    return require('bullmq') as Queues
  } catch (error) {
    throw missing(error)
  }
}

function missing(error: unknown): Qcow2Error {
  const reason = error instanceof Error ? error.message.split('\n')[0] : String(error)
  const message = `qcow2/jobs needs the packages ${PACKAGES}, beside qcow2: ${INSTALL} (${reason})`
  return new Qcow2Error('ERR_QCOW2_PEER_MISSING', message, { field: 'bullmq', cause: error })
}
